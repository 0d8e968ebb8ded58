//! The filter in nftables' words: one table in the network's namespace, for what crosses the bridge.
//!
//! The kernel's connection tracking for bridges is an option that not every kernel has, so which packets are answers is remembered in sets:
//! what passes notes the way back, and what is answered notes both, until nothing passed for some time. The sets stay when the rules are replaced.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fmt::Write as _,
    io::{self, Write as _},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::Path,
    process::{Command, Output, Stdio},
};

use ipnet::IpNet;

use crate::{
    BRIDGE_MAC,
    error::{Error, Result},
    filter::{Filter, PortFilter, Protocol, Rule, Service},
    namespace::Namespace,
};

/// Where `nft` is looked for on the host.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";
const TABLE: &str = "bridge portolan";
/// What is done to a packet that goes to the bridge and may not leave by it, and how that is known.
const REFUSE: &str = "meta mark set 0x706f7274 accept";
pub(crate) const IS_REFUSED: &str = "meta mark 0x706f7274";
/// How many directions of connections of a network are remembered on a node. More still pass; their answers do so by rules only.
const CONNECTIONS: u32 = 1 << 19;
/// How many pairs of talking pods, and how many packets in fragments.
const OTHERS: u32 = 1 << 16;

/// Both families: their sets' suffix, the name of their headers, what tells a later fragment, the first of several, and a packet's fragments.
const FAMILIES: [Family; 2] = [
    Family {
        suffix: "4",
        header: "ip",
        is_later_fragment: "ip frag-off & 0x1fff != 0",
        is_first_fragment: "ip frag-off & 0x3fff == 0x2000",
        fragment_key: "ip protocol . ip id",
    },
    Family {
        suffix: "6",
        header: "ip6",
        is_later_fragment: "frag frag-off != 0",
        is_first_fragment: "frag frag-off 0 frag more-fragments 1",
        fragment_key: "frag id",
    },
];

struct Family {
    suffix: &'static str,
    header: &'static str,
    is_later_fragment: &'static str,
    is_first_fragment: &'static str,
    fragment_key: &'static str,
}

impl Family {
    /// How a packet's connection is known.
    fn forth(&self) -> String {
        let ip = self.header;
        format!("{ip} saddr . {ip} daddr . meta l4proto . th sport . th dport")
    }

    /// How its answers' is.
    fn back(&self) -> String {
        let ip = self.header;
        format!("{ip} daddr . {ip} saddr . meta l4proto . th dport . th sport")
    }

    fn fragment(&self) -> String {
        let ip = self.header;
        format!("{ip} saddr . {ip} daddr . {}", self.fragment_key)
    }
}

/// What makes the table what the filter says, in one transaction; none if all ports are open.
pub(crate) fn script(filter: &Filter) -> Option<String> {
    let closed: Vec<&str> = filter.ports.iter().filter(|(_, f)| !f.is_open()).map(|(port, _)| port.as_str()).collect();
    if closed.is_empty() {
        return None;
    }
    let names = names(&closed);
    let mut text = format!("add table {TABLE}\n");
    add_sets(&mut text);
    for chain in ["answers", "egress", "outside", "ingress", "pass", "deliver"] {
        _ = writeln!(text, "add chain {TABLE} {chain}");
    }
    for hook in ["forward", "input", "output"] {
        _ = writeln!(text, "add chain {TABLE} {hook} {{ type filter hook {hook} priority 0; policy accept; }}");
    }
    _ = writeln!(text, "flush table {TABLE}\ntable {TABLE} {{");
    // Without ARP, neighbour discovery and what says who listens to which group, nothing else arrives.
    _ = writeln!(
        text,
        "chain forward {{
iifname != {names} oifname != {names} accept
ether type arp accept
ether type != {{ ip, ip6 }} drop
ip protocol igmp accept
icmpv6 type {{ 130, 131, 132, 133, 134, 135, 136, 143 }} accept
jump answers
jump egress
jump ingress
goto pass
}}"
    );
    add_outside(&mut text, &names);
    add_answers(&mut text);
    add_rules(&mut text, "egress", ("iifname", "daddr"), "drop", filter, |port| port.egress.as_deref());
    add_rules(&mut text, "outside", ("iifname", "daddr"), REFUSE, filter, |port| port.egress.as_deref());
    add_rules(&mut text, "ingress", ("oifname", "saddr"), "drop", filter, |port| port.ingress.as_deref());
    add_pass(&mut text);
    text.push_str("}\n");
    Some(text)
}

fn names(ports: &[&str]) -> String {
    let quoted: Vec<String> = ports.iter().map(|port| format!("\"{port}\"")).collect();
    format!("{{ {} }}", quoted.join(", "))
}

/// What is remembered, and for how long: a TCP connection for two minutes until it is answered, and for two after it was closed.
fn add_sets(text: &mut String) {
    for family in &FAMILIES {
        let (s, ip) = (family.suffix, family.header);
        let mut add = |name: &str, key: &str, size: u32, timeout: &str| {
            let flags = "flags dynamic,timeout";
            _ = writeln!(
                text,
                "add set {TABLE} {name}{s} {{ typeof {key}; size {size}; {flags}; timeout {timeout}; }}"
            );
        };
        add("flows", &family.forth(), CONNECTIONS, "3m");
        add("closed", &family.forth(), CONNECTIONS, "2m");
        add("talks", &format!("{ip} saddr . {ip} daddr"), OTHERS, "30s");
        add("fragments", &family.fragment(), OTHERS, "30s");
    }
}

/// What needs no rule: the rest of a packet whose first fragment passed, and what is of a connection that was answered, in both directions. A
/// TCP segment that begins a connection always needs one.
fn add_answers(text: &mut String) {
    text.push_str("chain answers {\n");
    for family in &FAMILIES {
        _ = writeln!(text, "{} {} @fragments{} accept", family.is_later_fragment, family.fragment(), family.suffix);
    }
    text.push_str("tcp flags & (syn|ack) == syn return\n");
    for family in &FAMILIES {
        let (s, forth, back, ip) = (family.suffix, family.forth(), family.back(), family.header);
        let closes = format!("update @closed{s} {{ {forth} }} update @closed{s} {{ {back} }}");
        let forgets = format!("delete @flows{s} {{ {forth} }} delete @flows{s} {{ {back} }}");
        _ = writeln!(
            text,
            "meta l4proto tcp {forth} @closed{s} update @closed{s} {{ {forth} }} goto deliver
tcp flags & (fin|rst) != 0 {forth} @flows{s} {closes} {forgets} goto deliver
meta l4proto tcp {forth} @flows{s} update @flows{s} {{ {forth} timeout 1d }} update @flows{s} {{ {back} timeout 1d }} goto deliver
meta l4proto {{ udp, sctp }} {forth} @flows{s} update @flows{s} {{ {forth} }} update @flows{s} {{ {back} }} goto deliver"
        );
        let kinds = match ip {
            "ip" => {
                "icmp type { echo-reply, timestamp-reply, destination-unreachable, time-exceeded, parameter-problem }"
            }
            _ => {
                "icmpv6 type { echo-reply, destination-unreachable, packet-too-big, time-exceeded, parameter-problem }"
            }
        };
        _ = writeln!(text, "{kinds} {ip} saddr . {ip} daddr @talks{s} goto deliver");
    }
    text.push_str("}\n");
}

/// Notes the way back of what passed by rules. What can't be noted, the sets being full, passes all the same.
fn add_pass(text: &mut String) {
    text.push_str("chain pass {\n");
    for family in &FAMILIES {
        let (s, forth, back, ip) = (family.suffix, family.forth(), family.back(), family.header);
        // Only an answer makes a TCP connection last: by itself nobody can fill the set for long.
        _ = writeln!(
            text,
            "tcp flags & (syn|ack) == syn delete @closed{s} {{ {forth} }} delete @closed{s} {{ {back} }}
meta l4proto tcp add @flows{s} {{ {back} timeout 2m }}
meta l4proto {{ udp, sctp }} update @flows{s} {{ {back} }}
update @talks{s} {{ {ip} daddr . {ip} saddr }}"
        );
    }
    text.push_str("goto deliver\n}\nchain deliver {\n");
    for family in &FAMILIES {
        let (s, key) = (family.suffix, family.fragment());
        _ = writeln!(text, "{} update @fragments{s} {{ {key} }}", family.is_first_fragment);
    }
    text.push_str("accept\n}\n");
}

/// What pods send to the bridge, which may be their gateway, and what it sends to them: answers, as nobody outside can begin a connection. What
/// no rule lets pass is marked, for the node's resolver gets it all the same; what is routed, and has the mark, is dropped (egress/rules.rs).
fn add_outside(text: &mut String, names: &str) {
    _ = writeln!(
        text,
        "chain input {{
iifname != {names} accept
ether daddr != {BRIDGE_MAC} accept
ether type != {{ ip, ip6 }} accept
ip daddr 169.254.0.0/16 accept
jump answers
jump outside
goto pass
}}
chain output {{
oifname != {names} accept
ether type != {{ ip, ip6 }} accept
jump answers
}}"
    );
}

/// A chain with the ports' rules of one direction, and what becomes of what none lets pass; ports with the same rules share them.
fn add_rules<'a>(
    text: &mut String,
    chain: &str,
    (interface, side): (&str, &str),
    refusal: &str,
    filter: &'a Filter,
    rules: impl Fn(&'a PortFilter) -> Option<&'a [Rule]>,
) {
    let mut by_rules: BTreeMap<&[Rule], Vec<&str>> = BTreeMap::new();
    for (port, of_port) in &filter.ports {
        if let Some(rules) = rules(of_port) {
            by_rules.entry(rules).or_default().push(port);
        }
    }
    _ = writeln!(text, "chain {chain} {{");
    for (rules, ports) in by_rules {
        _ = writeln!(text, "{interface} {} jump {{", names(&ports));
        for rule in rules {
            add_rule(text, side, rule);
        }
        _ = writeln!(text, "{refusal}\n}}");
    }
    text.push_str("}\n");
}

/// Lets pass what a rule is of: a line for each way to be a peer, and each way to be a service. Only single values are in sets: one with
/// intervals is empty for a moment after its rules are in force (seen on Linux 6.18), and what comes just then would be dropped.
fn add_rule(text: &mut String, side: &str, rule: &Rule) {
    let peers = match &rule.peers {
        None => vec![String::new()],
        Some(peers) => of_peers(side, peers),
    };
    let services = match &rule.services {
        None => vec![String::new()],
        Some(services) => [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .flat_map(|protocol| of_protocol(protocol, services.iter().filter(|s| s.protocol == protocol)))
            .collect(),
    };
    for peers in &peers {
        for services in &services {
            _ = writeln!(text, "{peers}{services}return");
        }
    }
}

/// Nothing where nobody is a peer: there is no match that nothing meets.
fn of_peers(side: &str, peers: &[IpNet]) -> Vec<String> {
    let is_host = |peer: &IpNet| peer.prefix_len() == peer.max_prefix_len();
    let (hosts, nets): (Vec<IpNet>, Vec<IpNet>) = peers.iter().partition(|peer| is_host(peer));
    let of = |header: &str, is_ipv6: bool| {
        let hosts = hosts.iter().map(IpNet::addr).filter(|host| host.is_ipv6() == is_ipv6);
        list(hosts.map(|host| host.to_string())).map(|hosts| format!("{header} {side} {hosts} "))
    };
    let header = |net: &IpNet| if net.addr().is_ipv6() { "ip6" } else { "ip" };
    let nets = IpNet::aggregate(&nets).into_iter().map(|net| format!("{} {side} {net} ", header(&net)));
    [of("ip", false), of("ip6", true)].into_iter().flatten().chain(nets).collect()
}

fn of_protocol<'a>(protocol: Protocol, services: impl Iterator<Item = &'a Service>) -> Vec<String> {
    let services = services.filter(|service| service.first <= service.last);
    let (single, ranges): (Vec<&Service>, Vec<&Service>) = services.partition(|service| service.first == service.last);
    let single = list(single.iter().map(|service| service.first.to_string()));
    let ranges = ranges.iter().map(|range| format!("{protocol} dport {}-{} ", range.first, range.last));
    single.map(|ports| format!("{protocol} dport {ports} ")).into_iter().chain(ranges).collect()
}

/// A set; none if it is empty.
fn list(values: impl Iterator<Item = String>) -> Option<String> {
    let values: Vec<String> = values.collect();
    (!values.is_empty()).then(|| format!("{{ {} }}", values.join(", ")))
}

/// Applies a script in a namespace, all of it or nothing. `root` is where the host's programs are seen.
pub(crate) async fn run(root: &Path, namespace: Namespace, script: String) -> Result<()> {
    let place = namespace.path().display().to_string();
    let fail = |message: String| Error::Filter { place: place.clone(), message };
    let output =
        output(root, namespace, &["-f", "-"], script).await?.map_err(|e| fail(format!("did not start: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    // It shows each line that is wrong, in a table that nobody has seen: the first says enough.
    let said = String::from_utf8_lossy(&output.stderr);
    Err(fail(said.lines().next().unwrap_or("no reason given").to_owned()))
}

/// Removes the filter's table, if there is one.
pub(crate) async fn clear(root: &Path, namespace: Namespace) -> Result<()> {
    remove_table(root, namespace, &["list", "table", "bridge", "portolan"]).await
}

/// Removes the table that the request lists, if there is one. Where there is no `nft`, or a kernel that has no such tables, there is none.
pub(crate) async fn remove_table(root: &Path, namespace: Namespace, list: &'static [&'static str]) -> Result<()> {
    let again = namespace.again()?;
    match output(root, namespace, list, String::new()).await? {
        Ok(output) if output.status.success() => run(root, again, format!("delete {}\n", list[1..].join(" "))).await,
        _ => Ok(()),
    }
}

/// Runs the host's `nft` in a namespace: the program, and what it needs, need not be in our image. The inner error is that of its start.
async fn output(
    root: &Path,
    namespace: Namespace,
    arguments: &'static [&'static str],
    input: String,
) -> Result<io::Result<Output>> {
    let root = root.to_owned();
    let work = move || namespace.run(|| Ok(spawn(&root, arguments, &input)));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Ok(Err(io::Error::other(e))))
}

fn spawn(root: &Path, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut command = Command::new("nft");
    command.args(arguments).env_clear().env("LC_ALL", "C").env("PATH", SEARCH_PATH);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let root = CString::new(root.as_os_str().as_bytes())?;
    let enter = move || {
        rustix::process::chroot(root.as_c_str())?;
        rustix::process::chdir(c"/")?;
        Ok(())
    };
    // SAFETY: between fork and exec `enter` makes two system calls on memory prepared before: no allocation, no lock.
    unsafe { command.pre_exec(enter) };
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // It reads all before it says anything. If it has ended already, its status says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(peers: Option<&[&str]>, services: Option<&[(Protocol, u16, u16)]>) -> Vec<String> {
        let peers = peers.map(|all| all.iter().map(|one| one.parse().unwrap()).collect());
        let service = |&(protocol, first, last): &(Protocol, u16, u16)| Service { protocol, first, last };
        let services = services.map(|all| all.iter().map(service).collect());
        let mut text = String::new();
        add_rule(&mut text, "saddr", &Rule { peers, services });
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_rule_is_a_line_for_each_family_and_protocol() {
        use Protocol::{Sctp, Tcp, Udp};
        assert_eq!(lines(None, None), ["return"]);
        assert_eq!(lines(Some(&[]), None), [""; 0], "nobody");
        assert_eq!(lines(None, Some(&[])), [""; 0], "nothing");
        assert_eq!(lines(Some(&["10.32.0.5/32"]), None), ["ip saddr { 10.32.0.5 } return"]);
        assert_eq!(
            lines(Some(&["10.32.0.5/32", "fd32::5/128"]), Some(&[(Tcp, 80, 80), (Tcp, 22, 22), (Udp, 53, 53)])),
            [
                "ip saddr { 10.32.0.5 } tcp dport { 22, 80 } return",
                "ip saddr { 10.32.0.5 } udp dport { 53 } return",
                "ip6 saddr { fd32::5 } tcp dport { 22, 80 } return",
                "ip6 saddr { fd32::5 } udp dport { 53 } return",
            ]
        );
        assert_eq!(lines(None, Some(&[(Sctp, 0, u16::MAX), (Tcp, 9, 8)])), ["sctp dport 0-65535 return"]);
    }

    #[test]
    fn no_set_has_intervals() {
        let peers = ["10.32.0.0/24", "10.32.0.5/32", "10.32.1.0/24", "fd32::/64"];
        assert_eq!(
            lines(Some(&peers), None),
            ["ip saddr { 10.32.0.5 } return", "ip saddr 10.32.0.0/23 return", "ip6 saddr fd32::/64 return"]
        );
        let services = [(Protocol::Tcp, 80, 80), (Protocol::Tcp, 90, 99)];
        assert_eq!(lines(None, Some(&services)), ["tcp dport { 80 } return", "tcp dport 90-99 return"]);
    }

    #[test]
    fn ports_with_the_same_rules_share_them() {
        let deny = PortFilter { ingress: Some(Vec::new()), egress: None };
        let ports = [("pa", deny.clone()), ("pb", deny), ("pc", PortFilter::default())];
        let filter = Filter { ports: ports.map(|(name, filter)| (name.to_owned(), filter)).into() };
        let script = script(&filter).unwrap();
        assert!(script.contains("oifname { \"pa\", \"pb\" } jump {\ndrop\n}"), "{script}");
        assert!(!script.contains("pc"), "{script}");
    }

    #[test]
    fn nothing_is_left_where_all_is_open() {
        assert_eq!(script(&Filter::default()), None);
        assert_eq!(script(&Filter { ports: [("pa".to_owned(), PortFilter::default())].into() }), None);
    }
}
