//! What a gateway lets pass, in nftables' words: tables in the network's namespace and one in the host's. Each is replaced in one step, and none
//! depends on links that may not be there yet.

use std::{fmt::Write as _, net::IpAddr};

use ipnet::IpNet;

use super::{Egress, HOST_LINKS, LINK, TRANSIT, TRANSIT_IPV6};
use crate::{BRIDGE, BRIDGE_MAC, TUNNEL, ipam::gateway, multicast::link_local_subnet, nft::IS_REFUSED};

/// Requests that list the tables.
pub(crate) const ROUTED: [&str; 4] = ["list", "table", "inet", "portolan_egress"];
pub(crate) const BRIDGED: [&str; 4] = ["list", "table", "bridge", "portolan_egress"];

/// Addresses that no router forwards to (RFC 3927, section 2.7; RFC 4291, section 2.5.6), other networks' and the metadata of clouds among them.
const NEVER: [&str; 2] = ["ip daddr 169.254.0.0/16", "ip6 daddr fe80::/10"];

/// The rules of the network's namespace.
pub(super) fn of_network(egress: &Egress) -> String {
    let mut text = String::new();
    begin(&mut text, "inet");
    // Back to the bridge goes nothing but answers: a pod that is reached by the gateway would be so past its rules.
    _ = writeln!(
        text,
        "chain forward {{
type filter hook forward priority 0; policy drop;
{IS_REFUSED} drop
iifname \"{LINK}\" oifname \"{BRIDGE}\" ct state established,related accept
iifname \"{BRIDGE}\" oifname \"{LINK}\" jump leaving
}}
chain leaving {{"
    );
    for never in NEVER {
        _ = writeln!(text, "{never} drop");
    }
    _ = writeln!(text, "ip6 daddr {TRANSIT_IPV6} drop");
    for subnet in &egress.subnets {
        _ = writeln!(text, "{} daddr {subnet} drop", header(subnet.addr()));
    }
    for subnet in &egress.subnets {
        _ = writeln!(text, "{} saddr {subnet} accept", header(subnet.addr()));
    }
    _ = writeln!(
        text,
        "}}
chain input {{
type filter hook input priority 0; policy accept;
iifname != \"{LINK}\" accept
ct state established,related accept
icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
drop
}}
chain postrouting {{
type nat hook postrouting priority srcnat; policy accept;
oifname \"{LINK}\" masquerade
}}
}}"
    );
    add_bridge(&mut text, &egress.subnets);
    text
}

fn begin(text: &mut String, family: &str) {
    let table = format!("table {family} portolan_egress");
    _ = writeln!(text, "add {table}\nflush {table}\n{table} {{");
}

fn header(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// The gateway is each node's own: nobody else passes for it, and nothing of it is on the way between nodes.
fn add_bridge(text: &mut String, subnets: &[IpNet]) {
    begin(text, "bridge");
    _ = writeln!(text, "chain prerouting {{\ntype filter hook prerouting priority -300; policy accept;");
    _ = writeln!(text, "ether saddr {BRIDGE_MAC} drop\niifname \"{TUNNEL}\" ether daddr {BRIDGE_MAC} drop");
    let gateways = subnets.iter().copied().map(gateway);
    let gateways: Vec<IpAddr> = gateways.chain([link_local_subnet().addr()]).collect();
    for gateway in &gateways {
        let ip = header(*gateway);
        _ = writeln!(text, "{ip} saddr {gateway} drop\niifname \"{TUNNEL}\" {ip} daddr {gateway} drop");
        _ = writeln!(text, "{} drop\niifname \"{TUNNEL}\" {} drop", claim(*gateway), question(*gateway));
    }
    _ = writeln!(text, "}}\nchain forward {{\ntype filter hook forward priority -1; policy accept;");
    _ = writeln!(text, "ether daddr {BRIDGE_MAC} drop");
    for gateway in &gateways {
        _ = writeln!(text, "{} daddr {gateway} drop\n{} drop", header(*gateway), question(*gateway));
    }
    _ = writeln!(
        text,
        "}}\nchain output {{\ntype filter hook output priority 0; policy accept;\noifname \"{TUNNEL}\" drop\n}}\n}}"
    );
}

/// What says that an address is at a MAC: ARP (RFC 826), or a neighbour advertisement (RFC 4861, section 4.4), whose target is eight bytes on.
fn claim(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("arp saddr ip {address}"),
        IpAddr::V6(address) => format!("icmpv6 type nd-neighbor-advert @th,64,128 {:#034x}", address.to_bits()),
    }
}

/// What asks at which MAC it is.
fn question(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("arp daddr ip {address}"),
        IpAddr::V6(address) => format!("icmpv6 type nd-neighbor-solicit @th,64,128 {:#034x}", address.to_bits()),
    }
}

/// The rules of the host, the same for however many networks. A pod sends no VXLAN by the gateway: nodes would take it for each other's, and it
/// could be a frame of any network.
pub(super) fn of_host(tunnel_port: u16) -> String {
    let mut text = String::new();
    begin(&mut text, "inet");
    _ = writeln!(
        text,
        "chain forward {{
type filter hook forward priority -1; policy accept;
iifname \"{HOST_LINKS}*\" oifname \"{HOST_LINKS}*\" drop
iifname \"{HOST_LINKS}*\" udp dport {tunnel_port} drop
oifname \"{HOST_LINKS}*\" ct state established,related accept
oifname \"{HOST_LINKS}*\" drop
}}
chain input {{
type filter hook input priority -1; policy accept;
iifname \"{HOST_LINKS}*\" udp dport {tunnel_port} drop
}}
chain postrouting {{
type nat hook postrouting priority srcnat; policy accept;
ip saddr {TRANSIT} masquerade
ip6 saddr {TRANSIT_IPV6} masquerade
}}
}}"
    );
    text
}
