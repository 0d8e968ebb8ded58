//! Packets between pods of two nodes: on a network of Portolan's, on a bridge and a VXLAN device that were made by hand beside it, and between the
//! nodes themselves.

use anyhow::{Context, Result, ensure};
use portolan_e2e::{
    lab::{Lab, text},
    scene::ready,
};

use crate::{
    Sizes,
    bare::{Bare, FOLDER},
    stats::{Pairs, Table},
    volumes::NAMESPACE,
};

/// Ports of the servers.
const IPERF: u16 = 7798;
const SOCKPERF: u16 = 7797;
/// Makes a pod's namespace `bench-pod` and a switch's `bench-switch` as Portolan has them: the node's own address, the other's, the pod's.
const BY_HAND: &str = r#"by_hand() {
  ip netns add bench-switch && ip netns add bench-pod &&
  ip link add bench-vx type vxlan id 9999 local "$1" dstport 7796 nolearning && ip link set bench-vx netns bench-switch &&
  ip -n bench-switch link add br0 type bridge &&
  ip -n bench-switch link set bench-vx mtu 1450 master br0 up && ip -n bench-switch link set br0 mtu 1450 up &&
  ip -n bench-switch link add port mtu 1450 type veth peer name eth1 netns bench-pod mtu 1450 &&
  ip -n bench-switch link set port master br0 up && ip -n bench-pod link set eth1 up && ip -n bench-pod addr add "$3/24" dev eth1 &&
  bridge -n bench-switch fdb append 00:00:00:00:00:00 dev bench-vx dst "$2"
}"#;
const TAKE_AWAY: &str = "for n in bench-pod bench-switch; do ! ip netns list | grep -qw $n || ip netns delete $n; done";

/// Where a server or a client is on its node: before a command, and what the client asks for.
struct Path {
    server: String,
    client: String,
    address: String,
}

impl Path {
    fn new(server: &str, client: &str, address: impl Into<String>) -> Self {
        let enter = |namespace: &str| match namespace {
            "" => String::new(),
            there => format!("nsenter --net={there} "),
        };
        Self { server: enter(server), client: enter(client), address: address.into() }
    }
}

/// What is measured: for people, its unit, and the client's command for an address and so many seconds, which prints one number.
struct Kind {
    what: &'static str,
    command: fn(&str, u32) -> String,
}

const RATES: [Kind; 3] = [
    Kind { what: "TCP, one stream: Gbit/s", command: |address, seconds| tcp(address, seconds, 1) },
    Kind { what: "TCP, four streams: Gbit/s", command: |address, seconds| tcp(address, seconds, 4) },
    Kind { what: "UDP, 64 bytes: thousand packets/s", command: udp },
];
const TIMES: [Kind; 1] = [Kind { what: "a question and its answer by UDP, 64 bytes", command: round_trip }];

/// CUBIC: a new namespace may have another default than the node.
fn tcp(address: &str, seconds: u32, streams: u32) -> String {
    let client = program("iperf3");
    format!(
        "{client} -c {address} -p {IPERF} -C cubic -P {streams} -t {seconds} -O 1 -J | awk '/sum_received/ {{ on = 1 }} \
         on && /bits_per_second/ {{ printf \"%.3f\", $2 / 1e9; exit }}'"
    )
}

fn udp(address: &str, seconds: u32) -> String {
    let client = program("iperf3");
    format!(
        "{client} -c {address} -p {IPERF} -u -b 0 -l 64 -t {seconds} -J | awk '/\"sum\":/ {{ on = 1 }} on && /\"seconds\"/ {{ s = $2 + 0 }} \
         on && /\"lost_packets\"/ {{ lost = $2 + 0 }} on && /\"packets\"/ {{ all = $2 + 0 }} \
         END {{ printf \"%.2f\", (all - lost) / s / 1000 }}'"
    )
}

/// Half of the way there and back is what sockperf reports.
fn round_trip(address: &str, seconds: u32) -> String {
    let client = program("sockperf");
    format!(
        "{client} pp -i {address} -p {SOCKPERF} -m 64 -t {seconds} 2>&1 | \
         awk '/Summary: Latency is/ {{ for (i = 1; i <= NF; i++) if ($i == \"is\") printf \"%.3f\", 2 * $(i + 1) }}'"
    )
}

fn program(name: &str) -> String {
    format!("{FOLDER}/{name}/ld.so --library-path {FOLDER}/{name} {FOLDER}/{name}/{name}")
}

/// All of it, from the first node to another.
///
/// # Errors
/// When a part does not run.
pub fn measure(lab: &Lab, bare: &mut Bare, node: &str, sizes: &Sizes) -> Result<[Table; 2]> {
    let other = lab.nodes()?.into_iter().find(|other| other != node).context("the lab has two nodes")?;
    let mut there = Bare::start(lab, &other)?;
    let underlay = [address_of(lab, node)?, address_of(lab, &other)?];
    for (end, at) in [(&mut *bare, node), (&mut there, other.as_str())] {
        for program in ["iperf3", "sockperf"] {
            end.bring(lab, at, program)?;
        }
        end.time(TAKE_AWAY)?;
        end.time(&BY_HAND.replace('\n', " "))?;
    }
    bare.time(&format!("by_hand {} {} 10.250.0.1", underlay[0], underlay[1]))?;
    there.time(&format!("by_hand {} {} 10.250.0.2", underlay[1], underlay[0]))?;
    let (here_pod, there_pod) = pods(lab, node, &other)?;
    let by_hand = "/run/netns/bench-pod";
    let paths = [
        Path::new(&namespace(&mut there, &there_pod)?, &namespace(bare, &here_pod)?, there_pod),
        Path::new(by_hand, by_hand, "10.250.0.2"),
        Path::new("", "", underlay[1].clone()),
    ];
    for (i, path) in paths.iter().enumerate() {
        serve(&mut there, i, path)?;
    }
    let [rates, times] = [&RATES[..], &TIMES[..]].map(|kinds| rows(bare, &paths, kinds, sizes));
    for end in [&mut *bare, &mut there] {
        end.time(&format!("for f in {FOLDER}/*.pid; do [ ! -e $f ] || kill $(tr -d '\\0' < $f) || true; done"))?;
        end.time(TAKE_AWAY)?;
    }
    there.clean_up()?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "net-a", "net-b", "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetwork", "bench", "--timeout=1m"])?;
    Ok([
        Table::new("From a pod of one node to one of another: more is better", "see the row", rates?),
        Table::new("From a pod of one node to one of another and back: less is better", "µs", times?),
    ])
}

fn rows(client: &mut Bare, paths: &[Path; 3], kinds: &[Kind], sizes: &Sizes) -> Result<Vec<Pairs>> {
    let mut rows = Vec::new();
    for kind in kinds {
        let mut by_hand = Pairs::new(kind.what, "bridge and VXLAN by hand");
        let mut nodes = Pairs::new(kind.what, "between the nodes");
        for i in 0..sizes.pairs {
            let mut found = [0.0; 3];
            // Who is first changes from round to round.
            for at in (0..3).map(|step| (i + step) % 3) {
                let path = &paths[at];
                let command =
                    format!("{}bash -c '{}'", path.client, quoted(&(kind.command)(&path.address, sizes.seconds / 2)));
                let printed = client.read(&command)?;
                found[at] = printed.parse().with_context(|| format!("{}: {printed:?} is no number", kind.what))?;
            }
            by_hand.push(found[0], found[1]);
            nodes.push(found[0], found[2]);
        }
        rows.extend([by_hand, nodes]);
    }
    Ok(rows)
}

/// Within single quotes of a shell.
fn quoted(command: &str) -> String {
    command.replace('\'', r"'\''")
}

/// Starts a path's servers.
fn serve(end: &mut Bare, number: usize, path: &Path) -> Result<()> {
    let (iperf, sockperf) = (program("iperf3"), program("sockperf"));
    end.time(&format!("{}{iperf} -s -p {IPERF} -D -I {FOLDER}/iperf3-{number}.pid", path.server))?;
    end.time(&format!(
        "{{ {}{sockperf} sr -i {} -p {SOCKPERF} > /dev/null 2>&1 & echo $! > {FOLDER}/sockperf-{number}.pid; }}",
        path.server, path.address
    ))
    .map(drop)
}

/// Two pods on a network, one on each node: their addresses.
fn pods(lab: &Lab, here: &str, there: &str) -> Result<(String, String)> {
    let pod = |name: &str, node: &str| {
        format!(
            "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}, annotations: {{portolan.dev/networks: bench}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: c, image: \"docker.io/portolan/postgres:15\", command: [sleep, infinity]}}
"
        )
    };
    let network = "apiVersion: portolan.dev/v1alpha1
kind: ContainerNetwork
metadata: {name: bench}
spec: {subnets: [10.83.0.0/24]}
";
    lab.apply(&format!("{network}{}{}", pod("net-a", here), pod("net-b", there)))?;
    let address = |name: &str| {
        lab.wait(&format!("pod {name} is Ready and on the network"), 90, || {
            ready(&lab.json(&["-n", NAMESPACE, "get", "pod", name])?)?;
            let slices = lab.json(&["get", "networknodeslices"])?;
            let slices = slices["items"].as_array().context("items")?;
            let endpoints = slices.iter().filter_map(|slice| slice["spec"]["endpoints"].as_array()).flatten();
            let found = endpoints.into_iter().find(|endpoint| endpoint["pod"] == name).context("no endpoint")?;
            Ok(text(found, "/address")?.to_owned())
        })
    };
    Ok((address("net-a")?, address("net-b")?))
}

/// The path of the namespace on the node that has an address.
fn namespace(end: &mut Bare, address: &str) -> Result<String> {
    let found = end.read(&format!(
        "for n in /run/netns/cni-*; do ! nsenter --net=$n ip -o -4 addr show | grep -q ' {address}/' || echo $n; done"
    ))?;
    ensure!(!found.is_empty() && !found.contains(' '), "the namespaces with {address} are {found:?}");
    Ok(found)
}

fn address_of(lab: &Lab, node: &str) -> Result<String> {
    let node = lab.json(&["get", "node", node])?;
    let addresses = node["status"]["addresses"].as_array().context("addresses")?;
    let internal = addresses.iter().find(|address| address["type"] == "InternalIP").context("no InternalIP")?;
    Ok(text(internal, "/address")?.to_owned())
}
