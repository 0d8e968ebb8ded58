//! What the host does to packets of its pods, in nftables' words: one table, replaced in one step.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::{DEVICE, HostPort, LINKS, PodNetwork};

/// The request that lists the table.
pub(super) const TABLE: [&str; 4] = ["list", "table", "inet", "portolan_pods"];

fn header(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// The rules of the host.
pub(super) fn of_host(network: &PodNetwork, ports: &[HostPort]) -> String {
    let mut text =
        "add table inet portolan_pods\nflush table inet portolan_pods\ntable inet portolan_pods {\n".to_owned();
    add_filters(&mut text, network.port);
    add_host_ports(&mut text, ports);
    add_masquerading(&mut text, network, ports);
    text + "}\n"
}

/// The host's loopback addresses are nobody else's, though links to pods let them pass. And no tunnel begins at a pod: nodes would take it for
/// each other's, with a frame of any network in it.
fn add_filters(text: &mut String, tunnel_port: u16) {
    _ = writeln!(
        text,
        "chain raw {{
type filter hook prerouting priority raw; policy accept;
iifname \"{LINKS}*\" ip daddr 127.0.0.0/8 drop
iifname \"{LINKS}*\" ip saddr 127.0.0.0/8 drop
}}
chain input {{
type filter hook input priority -1; policy accept;
iifname \"{LINKS}*\" udp dport {tunnel_port} drop
iifname \"{DEVICE}\" udp dport {tunnel_port} drop
}}
chain forward {{
type filter hook forward priority -1; policy accept;
iifname \"{LINKS}*\" oifname != \"{LINKS}*\" oifname != \"{DEVICE}\" udp dport {tunnel_port} drop
}}"
    );
}

/// The ports of the host that lead to pods, for who comes from elsewhere and for the host itself.
fn add_host_ports(text: &mut String, ports: &[HostPort]) {
    for hook in ["prerouting", "output"] {
        _ = writeln!(
            text,
            "chain to_{hook} {{\ntype nat hook {hook} priority -100; policy accept;\nfib daddr type local jump host_ports\n}}"
        );
    }
    _ = writeln!(text, "chain host_ports {{");
    for port in ports {
        let of_family = |pod: &&IpAddr| port.at.is_none_or(|at| at.is_ipv4() == pod.is_ipv4());
        for pod in port.pod.iter().filter(of_family) {
            let (ip, to) = (header(*pod), SocketAddr::new(*pod, port.pod_port));
            let family = if pod.is_ipv4() { "ipv4" } else { "ipv6" };
            let at = port.at.filter(|at| !at.is_unspecified());
            let at = at.map_or_else(|| format!("meta nfproto {family}"), |at| format!("{ip} daddr {at}"));
            _ = writeln!(text, "{at} {} dport {} dnat {ip} to {to}", port.protocol, port.port);
        }
    }
    _ = writeln!(text, "}}");
}

/// What leaves the pods' addresses for others has the host's. So has what would come back to where it is from without passing the host.
fn add_masquerading(text: &mut String, network: &PodNetwork, ports: &[HostPort]) {
    _ = writeln!(text, "chain postrouting {{\ntype nat hook postrouting priority srcnat; policy accept;");
    _ = writeln!(text, "oifname \"{LINKS}*\" ip saddr 127.0.0.0/8 masquerade");
    let mut hairpins: Vec<IpAddr> = ports.iter().flat_map(|port| &port.pod).copied().collect();
    hairpins.sort_unstable();
    hairpins.dedup();
    for pod in hairpins {
        let ip = header(pod);
        _ = writeln!(text, "{ip} saddr {pod} {ip} daddr {pod} masquerade");
    }
    for block in &network.blocks {
        _ = writeln!(text, "{} saddr {block} jump leaving", header(block.addr()));
    }
    _ = writeln!(text, "}}\nchain leaving {{");
    let blocks = network.others.iter().flat_map(|other| &other.blocks).chain(&network.blocks).copied();
    for block in IpNet::aggregate(&blocks.collect::<Vec<_>>()) {
        _ = writeln!(text, "{} daddr {block} return", header(block.addr()));
    }
    // Two connections that begin at once never get the same port.
    _ = writeln!(text, "masquerade fully-random\n}}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OtherNode, Protocol};

    fn network() -> PodNetwork {
        let other = |vtep: [u8; 4], blocks: &[&str]| OtherNode {
            vtep: vtep.into(),
            blocks: blocks.iter().map(|block| block.parse().unwrap()).collect(),
        };
        PodNetwork {
            vtep: [192, 0, 2, 1].into(),
            port: 7789,
            mtu: 1450,
            blocks: vec!["10.244.0.0/24".parse().unwrap(), "fd44:0:0:1::/64".parse().unwrap()],
            others: vec![other([192, 0, 2, 2], &["10.244.1.0/24"]), other([192, 0, 2, 3], &["10.244.7.0/24"])],
        }
    }

    #[test]
    fn neighbouring_blocks_share_a_rule() {
        let text = of_host(&network(), &[]);
        let returns: Vec<&str> = text.lines().filter(|line| line.ends_with("return")).collect();
        let expected =
            ["ip daddr 10.244.0.0/23 return", "ip daddr 10.244.7.0/24 return", "ip6 daddr fd44:0:0:1::/64 return"];
        assert_eq!(returns, expected);
    }

    #[test]
    fn a_host_port_is_at_the_addresses_it_is_asked_for() {
        let of = |at: Option<&str>| {
            let pod = ["10.244.0.5", "fd44:0:0:1::5"].map(|address| address.parse().unwrap()).into();
            let at = at.map(|at| at.parse().unwrap());
            let port = HostPort { at, protocol: Protocol::Tcp, port: 8080, pod, pod_port: 80 };
            let text = of_host(&network(), &[port]);
            text.lines().filter(|line| line.contains("dnat")).map(str::to_owned).collect::<Vec<_>>()
        };
        let (four, six) = (
            "meta nfproto ipv4 tcp dport 8080 dnat ip to 10.244.0.5:80",
            "meta nfproto ipv6 tcp dport 8080 dnat ip6 to [fd44:0:0:1::5]:80",
        );
        assert_eq!(of(None), [four, six]);
        assert_eq!(of(Some("0.0.0.0")), [four]);
        assert_eq!(of(Some("127.0.0.1")), ["ip daddr 127.0.0.1 tcp dport 8080 dnat ip to 10.244.0.5:80"]);
        assert_eq!(of(Some("::")), [six]);
    }
}
