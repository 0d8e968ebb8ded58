//! What can go wrong, each with the object it went wrong with.

use std::{io, net::IpAddr, path::PathBuf};

use ipnet::IpNet;

use crate::Mac;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An operation on the node's networks that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a netlink request.
    #[error("{action} (in {place}): {source}")]
    Netlink {
        /// What was asked for.
        action: String,
        /// The namespace it was asked in.
        place: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused forwarding entries.
    #[error("{action} (in {place}): {source}{}", more(*.others))]
    Entry {
        /// What was asked for.
        action: String,
        /// The namespace it was asked in.
        place: String,
        /// The kernel's answer.
        source: io::Error,
        /// How many others were refused, too.
        others: usize,
    },
    /// A namespace can't be opened, made or entered.
    #[error("network namespace {path}: {action}: {source}")]
    Namespace {
        /// The namespace's path, as the host sees it.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The path is there but isn't a network namespace.
    #[error("{path} is not a network namespace")]
    NotANamespace {
        /// The path, as the host sees it.
        path: PathBuf,
    },
    /// The network has no namespace on this node.
    #[error("network with VNI {vni} is not set up on this node")]
    NoNetwork {
        /// Its identifier.
        vni: u32,
    },
    /// Other nodes can't be asked whether they are there.
    #[error("ICMP socket: {source}")]
    Ping {
        /// Why it can't be opened.
        source: io::Error,
    },
    /// A kernel parameter can't be set.
    #[error("sysctl {key} = {value} (in {place}): {source}")]
    Sysctl {
        /// The parameter, with slashes.
        key: String,
        /// The value.
        value: String,
        /// The namespace.
        place: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A pod has an interface of that name that isn't ours.
    #[error("interface {interface} is already there in {netns}")]
    InterfaceTaken {
        /// The interface's name.
        interface: String,
        /// The pod's namespace.
        netns: PathBuf,
    },
    /// A link that was just made isn't there.
    #[error("link {link} is not there (in {place})")]
    NoLink {
        /// The link's name.
        link: String,
        /// The namespace.
        place: String,
    },
    /// A link of a port, or its pod's, forwards nothing.
    #[error("link {link} is down (in {place})")]
    Down {
        /// The link's name.
        link: String,
        /// The namespace.
        place: String,
    },
    /// An interface can't have an IPv6 address.
    #[error("MTU {mtu} of interface {interface} is too small for its address {address}; allowed: 1280 or more")]
    MtuTooSmall {
        /// The MTU in bytes.
        mtu: u32,
        /// The address.
        address: IpNet,
        /// The interface's name.
        interface: String,
    },
    /// A pod's interface lacks an address.
    #[error("interface {interface} does not have the address {address} (in {netns})")]
    NoAddress {
        /// The address.
        address: IpNet,
        /// The interface's name.
        interface: String,
        /// The pod's namespace.
        netns: PathBuf,
    },
    /// A port is plugged in, and the kernel doesn't let frames through.
    #[error("port {port} does not forward, {seconds} s after it came up (in {place})")]
    NotForwarding {
        /// The port's name.
        port: String,
        /// The network's namespace.
        place: String,
        /// How long we waited.
        seconds: u64,
    },
    /// A pod could send by any MAC.
    #[error("port {port} is not locked to its MAC (in {place}); this needs Linux 5.18 or later")]
    NotLocked {
        /// The port's name.
        port: String,
        /// The network's namespace.
        place: String,
    },
    /// A port has not what it was given beside its lock (bridge(8)).
    #[error("port {port} does not have {option} {} (in {place})", if *.wanted { "on" } else { "off" })]
    PortOption {
        /// The port's name.
        port: String,
        /// The option.
        option: &'static str,
        /// Whether it is to be on.
        wanted: bool,
        /// The network's namespace.
        place: String,
    },
    /// A pod could send by any address, or not by those that it may use.
    #[error("port {port} is not held to its pod's addresses (in {place})")]
    NotGuarded {
        /// The port's name.
        port: String,
        /// The network's namespace.
        place: String,
    },
    /// A pod could send or receive faster than it may.
    #[error("port {port} is not held to its pod's bandwidth (in {place})")]
    NotLimited {
        /// The port's name.
        port: String,
        /// The network's namespace.
        place: String,
    },
    /// What may pass at a network's ports can't be set.
    #[error("nft (in {place}): {message}")]
    Filter {
        /// The network's namespace.
        place: String,
        /// What nft said, or why it did not start.
        message: String,
    },
    /// A pod doesn't send to the outside by the gateway that it is to.
    #[error("interface {interface} has no default route by {gateway} (in {netns})")]
    NoDefaultRoute {
        /// The gateway.
        gateway: IpAddr,
        /// The interface's name.
        interface: String,
        /// The pod's namespace.
        netns: PathBuf,
    },
    /// The host doesn't lead what is for a pod to it.
    #[error("no route to {address} by {link} on this node")]
    NoPodRoute {
        /// The pod's address.
        address: IpAddr,
        /// The host's end of its link.
        link: String,
    },
    /// A link can't be told at which MAC an address is.
    #[error("announce the addresses at {mac} (in {place}): {source}")]
    Announcement {
        /// The MAC.
        mac: Mac,
        /// The namespace.
        place: String,
        /// Why not.
        source: io::Error,
    },
    /// No address is left between a network and the host.
    #[error("all of {range} is in use on this host: no network can get a gateway any more")]
    NoTransit {
        /// What they are taken from.
        range: IpNet,
    },
    /// Encrypted networks can't be used on this node.
    #[error("this node's kernel has no WireGuard: {source}")]
    NoWireGuard {
        /// What it says to a device of that type.
        source: io::Error,
    },
    /// No interface of the host has the tunnel endpoint's address.
    #[error("no interface of this node has the address {0}")]
    NoUnderlay(IpAddr),
    /// The tunnel endpoint's address is none that other nodes can send to.
    #[error(
        "{0} can't be this node's address on the underlay: it is link-local, and means another interface on each node; \
         allowed: an address that the other nodes have a route to"
    )]
    LinkLocalUnderlay(IpAddr),
}

impl Error {
    /// Whether the kernel answered with this error number.
    pub(crate) fn is_errno(&self, errno: i32) -> bool {
        matches!(self, Self::Netlink { source, .. } if source.raw_os_error() == Some(errno))
    }
}

fn more(others: usize) -> String {
    match others {
        0 => String::new(),
        1 => ", and 1 entry more".to_owned(),
        _ => format!(", and {others} entries more"),
    }
}
