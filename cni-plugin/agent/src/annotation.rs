//! What pods ask for by annotations: `portolan.dev/networks` (`backend`, `backend, frontend@eth2`, or a list of JSON objects), and
//! `portolan.dev/allowed-addresses`.

mod selection;

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use portolan_crds::{ALLOWED_ADDRESSES_ANNOTATION, NETWORKS_ANNOTATION, is_network_name};
use portolan_net::{Allowed, Bandwidth, Mac};

/// What an interface may be called (the kernel's IFNAMSIZ less one).
const INTERFACE_LIMIT: usize = 15;
/// More interfaces than any pod needs; each is a device in the kernel.
const NETWORKS_LIMIT: usize = 16;
/// Each is in a program that is run for each frame.
const ADDRESSES_LIMIT: usize = 8;

/// One network that a pod wants to be plugged into.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wish {
    /// The network.
    pub network: String,
    /// The interface's name in the pod.
    pub interface: String,
    /// Whether the annotation names it.
    pub named: bool,
    /// The addresses it is to have, at most one of a family; the others are any.
    pub addresses: Vec<IpAddr>,
    /// The MAC it is to have.
    pub mac: Option<Mac>,
    /// How fast the pod may receive and send there.
    pub bandwidth: Bandwidth,
    /// By whom it is to reach what is on none of its networks, at most one of a family.
    pub gateways: Vec<IpAddr>,
}

/// An annotation that can't be followed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("annotation {annotation}: {given:?} was given; allowed: {allowed}")]
pub struct AnnotationError {
    annotation: &'static str,
    given: String,
    allowed: &'static str,
}

/// Reads the annotation. Interfaces that aren't named are `eth1`, `eth2`, … in order.
///
/// # Errors
/// When a part is not `network` or `network@interface`, or not what is known of an object, or a network or interface comes twice.
pub fn parse(text: &str) -> Result<Vec<Wish>, AnnotationError> {
    let wishes = if text.trim_start().starts_with('[') { selection::parse(text)? } else { parse_names(text)? };
    if wishes.len() > NETWORKS_LIMIT {
        return Err(refuse(text, "at most 16 networks"));
    }
    let networks: BTreeSet<&str> = wishes.iter().map(|w| w.network.as_str()).collect();
    if networks.len() < wishes.len() {
        return Err(refuse(text, "each network once"));
    }
    let interfaces: BTreeSet<&str> = wishes.iter().map(|w| w.interface.as_str()).collect();
    if interfaces.len() < wishes.len() {
        return Err(refuse(text, "each interface once (those without a name are eth1, eth2, … by their position)"));
    }
    let gateways = wishes.iter().flat_map(|wish| &wish.gateways);
    if [true, false].iter().any(|family| gateways.clone().filter(|it| it.is_ipv4() == *family).count() > 1) {
        return Err(refuse(text, "one default-route of each family, of all networks of a pod"));
    }
    Ok(wishes)
}

fn parse_names(text: &str) -> Result<Vec<Wish>, AnnotationError> {
    let mut wishes = Vec::new();
    for (position, part) in text.split(',').map(str::trim).enumerate() {
        let (network, interface) = match part.split_once('@') {
            Some((network, interface)) => (network.trim_end(), interface.trim_start().to_owned()),
            None => (part, default_interface(position)),
        };
        if !is_network_name(network) {
            return Err(refuse(
                part,
                "names of ContainerNetworks, separated by commas, such as \"backend, frontend@eth2\"",
            ));
        }
        if !is_interface_name(&interface) {
            return Err(refuse(
                part,
                "after '@' an interface's name: 1 to 15 letters, digits, '_', '.' or '-', neither eth0 nor lo",
            ));
        }
        let named = part.contains('@');
        let (network, bandwidth) = (network.to_owned(), Bandwidth::default());
        wishes.push(Wish {
            network,
            interface,
            named,
            addresses: Vec::new(),
            mac: None,
            bandwidth,
            gateways: Vec::new(),
        });
    }
    Ok(wishes)
}

fn refuse(given: &str, allowed: &'static str) -> AnnotationError {
    AnnotationError { annotation: NETWORKS_ANNOTATION, given: given.to_owned(), allowed }
}

fn default_interface(position: usize) -> String {
    format!("eth{}", position + 1)
}

/// The addresses that a pod may use beside its own.
///
/// # Errors
/// When a part of the annotation is neither an address nor a subnet, or there are too many.
pub fn allowed(pod: &Pod) -> Result<Allowed, AnnotationError> {
    pod.annotations().get(ALLOWED_ADDRESSES_ANNOTATION).map_or(Ok(Allowed::default()), |text| parse_allowed(text))
}

fn parse_allowed(text: &str) -> Result<Allowed, AnnotationError> {
    let refuse = |given: &str, allowed| AnnotationError {
        annotation: ALLOWED_ADDRESSES_ANNOTATION,
        given: given.to_owned(),
        allowed,
    };
    if text.trim() == "any" {
        return Ok(Allowed::Any);
    }
    let mut subnets = BTreeSet::new();
    for part in text.split(',').map(str::trim) {
        let subnet = part.parse::<IpAddr>().map(IpNet::from).or_else(|_| part.parse::<IpNet>());
        let subnet = subnet.ok().filter(|subnet| subnet.addr() == subnet.network() && !is_nobodys(subnet.addr()));
        subnets.insert(subnet.ok_or_else(|| {
            refuse(
                part,
                "addresses that a host can have, and CIDRs without host bits, separated by commas, such as \"10.32.0.100, fd32::/120\"; or \"any\"",
            )
        })?);
    }
    if subnets.len() > ADDRESSES_LIMIT {
        return Err(refuse(text, "at most 8 addresses and CIDRs"));
    }
    Ok(Allowed::Further(subnets.into_iter().collect()))
}

/// Whether no host has such an address: a group's, or one that never leaves a host.
fn is_nobodys(address: IpAddr) -> bool {
    address.is_multicast() || address.is_loopback() || address == IpAddr::from([255; 4])
}

fn is_interface_name(name: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=INTERFACE_LIMIT).contains(&name.len())
        && name.bytes().all(fine)
        && !name.starts_with('.')
        && !matches!(name, "lo" | "eth0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_understood() {
        let cases = [
            ("backend", vec![("backend", "eth1")]),
            ("backend, frontend@eth2", vec![("backend", "eth1"), ("frontend", "eth2")]),
            (" backend ,frontend ", vec![("backend", "eth1"), ("frontend", "eth2")]),
            ("backend@db0", vec![("backend", "db0")]),
            ("a.b@net-1,c", vec![("a.b", "net-1"), ("c", "eth2")]),
        ];
        for (text, wanted) in cases {
            let got = parse(text).unwrap();
            let got: Vec<(&str, &str)> = got.iter().map(|w| (w.network.as_str(), w.interface.as_str())).collect();
            assert_eq!(got, wanted, "{text}");
        }
    }

    #[test]
    fn what_is_refused_and_why() {
        let cases = [
            ("", "\"\" was given; allowed: names of"),
            ("backend,", "\"\" was given"),
            ("Backend", "\"Backend\" was given"),
            ("back end", "names of ContainerNetworks"),
            ("backend@", "after '@'"),
            ("backend@eth0", "neither eth0"),
            ("backend@a/b", "after '@'"),
            ("backend@sixteen-letters0", "1 to 15"),
            ("backend,backend", "each network once"),
            ("backend@eth2,frontend", "each interface once"),
            ("-a", "names of"),
        ];
        for (text, named) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("annotation portolan.dev/networks: "), "{error}");
            assert!(error.contains(named), "{text:?}: {error} should say {named}");
        }
    }

    #[test]
    fn allowed_addresses() {
        let texts = |text: &str| match parse_allowed(text).unwrap() {
            Allowed::Any => "any".to_owned(),
            Allowed::Further(subnets) => subnets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" "),
        };
        let cases = [
            ("10.32.0.100", "10.32.0.100/32"),
            (" fd32::100 ,10.32.0.96/28, 10.32.0.96/28", "10.32.0.96/28 fd32::100/128"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            (" any ", "any"),
        ];
        for (given, wanted) in cases {
            assert_eq!(texts(given), wanted, "{given}");
        }
        assert_eq!(allowed(&Pod::default()), Ok(Allowed::default()), "without the annotation");
        let nine: Vec<String> = (1..10).map(|n| format!("10.32.0.{n}")).collect();
        let wrong =
            ["", "10.32.0.100,", "10.32.0", "10.32.0.1/24", "10.32.0.0/33", "Any", "any, 10.32.0.1", "fd32::1%eth1"];
        for (given, named) in wrong.iter().map(|text| (*text, "addresses that a host can have")).chain([
            ("224.0.0.18", "a host can have"),
            ("ff02::/16", "a host can have"),
            ("127.0.0.1", "a host can have"),
            (&*nine.join(","), "at most 8"),
        ]) {
            let error = parse_allowed(given).unwrap_err().to_string();
            assert!(error.starts_with("annotation portolan.dev/allowed-addresses: \""), "{error}");
            assert!(error.contains(named), "{given:?}: {error} should say {named}");
        }
    }
}
