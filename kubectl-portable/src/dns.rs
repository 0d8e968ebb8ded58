//! `kubectl portable dns lookup`: what a pod is answered for a name, and why.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt};
use portolan_crds::{ContainerNetwork, Endpoint, NETWORKS_ANNOTATION, NetworkNodeSlice};
use portolan_dns::{Domain, Explanation, Host, Member, NetworkZone, Port, Zone};

use crate::{print, status};

/// Where the agents answer.
const SERVER: &str = "169.254.53.53";

/// About names.
#[derive(Subcommand)]
pub enum Command {
    /// Explains the answer that a pod gets for a name, from what the nodes say of their pods.
    Lookup(Options),
}

/// Which name, and who asks.
#[derive(Args)]
pub struct Options {
    /// The name in full (db.backend, db.shop.backend, _http._tcp.web.backend), or an address.
    name: String,
    /// The pod that asks: `pod/NAME` or `NAME`.
    #[arg(long, value_name = "POD")]
    from: String,
    /// The pod's namespace; kubectl's own if not given.
    #[arg(short, long)]
    namespace: Option<String>,
    /// The domain of full names: the chart's value dns.domain.
    #[arg(long, default_value = "portolan.internal")]
    domain: Domain,
}

/// Reads what is needed, and prints the explanation.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("can't find out which cluster to talk to: is KUBECONFIG set?")?;
    let namespace = options.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let pod = options.from.split_once('/').map_or(options.from.as_str(), |(_, name)| name);
    let slices = status::list::<NetworkNodeSlice>(&client).await?;
    let networks = status::list::<ContainerNetwork>(&client).await?;
    let api: Api<Pod> = Api::namespaced(client, &namespace);
    let found = api.get_opt(pod).await.with_context(|| format!("can't read pod {namespace}/{pod}"))?;
    let Some(found) = found else { bail!("there is no pod {pod} in namespace {namespace}") };
    let asker = Asker::new(&namespace, pod, &slices)?;
    print(explained(&options.name, &options.domain, &asker, &slices, &networks).trim_end())?;
    if let Some(note) = note_on_settings(&found) {
        print(&note)?;
    }
    Ok(())
}

/// The pod that asks, as the slices have it.
struct Asker<'a> {
    name: String,
    node: &'a str,
    /// Its networks, and its endpoint on each.
    on: BTreeMap<&'a str, &'a Endpoint>,
}

impl<'a> Asker<'a> {
    fn new(namespace: &str, pod: &str, slices: &'a [NetworkNodeSlice]) -> anyhow::Result<Self> {
        let name = format!("{namespace}/{pod}");
        let mut asker = Self { name, node: "", on: BTreeMap::new() };
        for slice in slices {
            for endpoint in slice.spec.endpoints.iter().filter(|it| it.namespace == namespace && it.pod == pod) {
                asker.node = &slice.spec.node;
                asker.on.insert(&slice.spec.network, endpoint);
            }
        }
        if asker.on.is_empty() {
            bail!("pod {} is on no network: has it the annotation {NETWORKS_ANNOTATION}, and does it run?", asker.name);
        }
        Ok(asker)
    }
}

fn explained(
    name: &str,
    domain: &Domain,
    asker: &Asker<'_>,
    slices: &[NetworkNodeSlice],
    networks: &[ContainerNetwork],
) -> String {
    let on: Vec<String> = asker.on.keys().map(|network| (*network).to_owned()).collect();
    let zones = on.iter().map(|network| zone(network, &on, asker, slices, networks));
    let zone = Zone::new(zones.collect()).within(Some(domain.clone()));
    let asked = asker.on.iter().find_map(|(network, it)| Some((*network, it.addresses().next()?)));
    let mut text =
        format!("{name}, asked by pod {} on node {} (networks: {})\n\n", asker.name, asker.node, on.join(", "));
    let Some((network, source)) = asked else { return text + "its address can't be read" };
    match zone.explain(network, source, name) {
        Explanation::Elsewhere => text.push_str("Forwarded to the cluster's DNS: the name is in none of the pod's networks.\n"),
        Explanation::Nobody { network } => text.push_str(&format!("NXDOMAIN: no pod on network {network} has this name.\n")),
        Explanation::Ambiguous { network, namespaces } => text.push_str(&format!(
            "No answer (NOERROR): on network {network} namespaces {} have this name, and the pod's own has not. Ask with the namespace.\n",
            namespaces.join(", ")
        )),
        Explanation::Pods { network, pods } if pods.is_empty() => {
            text.push_str(&format!("No answer (NOERROR): on network {network} only longer names end in this one.\n"));
        }
        Explanation::Pods { network, pods } => {
            let title = format!("PODS ON NETWORK {network} WITH THIS NAME");
            status::section(&mut text, &title, "POD NODE ADDRESS ANSWERED", pods.iter().map(|(pod, is)| row(pod, answered(pod, *is))));
            if !pods.iter().any(|(_, is_answered)| *is_answered) {
                text.push_str("No answer (NOERROR): the name is known, but none of its pods is Ready.\n");
            }
        }
        Explanation::Services { network, pods } => {
            let title = format!("SERVICES ON NETWORK {network}");
            status::section(&mut text, &title, "POD NODE ADDRESS PORT", pods.iter().map(|(pod, port)| row(pod, port.to_string())));
        }
        Explanation::Address { network, pod } => {
            text.push_str(&format!("{}.{}.{network}\n", pod.pod, pod.namespace));
        }
    }
    text
}

fn row(pod: &Host, last: String) -> Vec<String> {
    let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
    vec![format!("{}/{}", pod.namespace, pod.pod), pod.node.clone(), addresses.join(","), last]
}

fn answered(pod: &Host, is_answered: bool) -> String {
    let why = match is_answered {
        true if !pod.ready => "yes, though not Ready: it asks for that",
        true => "yes",
        false if !pod.is_published() => "no: it is not Ready",
        false => "no: pods of the asking pod's node are preferred",
    };
    why.to_owned()
}

fn zone(
    network: &str,
    on: &[String],
    asker: &Asker<'_>,
    slices: &[NetworkNodeSlice],
    networks: &[ContainerNetwork],
) -> NetworkZone {
    let object = networks.iter().find(|it| it.name_any() == network);
    let subnets = object.into_iter().flat_map(|it| &it.spec.subnets).filter_map(|it| it.parse().ok()).collect();
    let mut hosts = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.spec.network == network) {
        let version: u64 = slice.metadata.resource_version.as_deref().and_then(|it| it.parse().ok()).unwrap_or(0);
        for endpoint in &slice.spec.endpoints {
            // An address that two nodes have is a pod's that has moved: where it is Ready, or else where that was written last.
            let rank = (endpoint.ready, version);
            let place = hosts.entry(endpoint.address.as_str()).or_insert((rank, slice, endpoint));
            if rank > place.0 {
                *place = (rank, slice, endpoint);
            }
        }
    }
    let hosts = hosts.into_values().map(|(_, slice, endpoint)| host(endpoint, &slice.spec.node)).collect();
    let address = asker.on.get(network).and_then(|endpoint| endpoint.addresses().next());
    let namespace = asker.name.split('/').next().unwrap_or_default().to_owned();
    let member = |address| Member { address, namespace, networks: on.to_vec() };
    let members = address.map(member).into_iter().collect();
    NetworkZone { name: network.to_owned(), node: asker.node.to_owned(), subnets, hosts, members }
}

fn host(endpoint: &Endpoint, node: &str) -> Host {
    let ports = endpoint.ports.iter().map(|port| Port {
        name: port.name.clone(),
        protocol: port.protocol.to_ascii_lowercase(),
        number: port.port,
    });
    Host {
        namespace: endpoint.namespace.clone(),
        pod: endpoint.pod.clone(),
        owner: endpoint.owner.clone(),
        aliases: endpoint.aliases.clone(),
        node: node.to_owned(),
        addresses: endpoint.addresses().collect(),
        ports: ports.collect(),
        ready: endpoint.ready,
        publish_not_ready: endpoint.publish_not_ready,
        prefer_same_node: endpoint.prefer_same_node,
        node_is_silent: false,
    }
}

/// What keeps the pod from asking the agent at all.
fn note_on_settings(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let servers = spec.dns_config.as_ref().and_then(|config| config.nameservers.clone()).unwrap_or_default();
    let first = servers.first().map(String::as_str);
    (first != Some(SERVER)).then(|| {
        let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
        format!(
            "\nThe pod doesn't ask {SERVER} first: its dnsPolicy is {policy}, its first nameserver {}. It was made before the webhook, or chose so itself.",
            first.unwrap_or("none of its own")
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slices() -> Vec<NetworkNodeSlice> {
        let slice = |node: &str, version: &str, endpoints| {
            let spec = json!({"network": "backend", "node": node, "vtep": "192.0.2.1", "endpoints": endpoints});
            let metadata = json!({"name": format!("backend.{node}"), "resourceVersion": version});
            serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
        };
        let endpoint = |pod: &str, last: u8, ready: bool| {
            json!({"address": format!("10.32.0.{last}"), "mac": "02:00:00:00:00:01", "namespace": "shop", "pod": pod,
                "owner": pod.split('-').next(), "ready": ready})
        };
        vec![
            slice("a", "7", json!([endpoint("web", 1, true), endpoint("db-0", 2, true)])),
            slice("b", "9", json!([endpoint("db-1", 3, false), endpoint("db-0", 2, false)])),
        ]
    }

    fn ask(name: &str) -> String {
        let slices = slices();
        let spec = json!({"metadata": {"name": "backend"}, "spec": {"subnets": ["10.32.0.0/16"]}});
        let networks = [serde_json::from_value(spec).unwrap()];
        let domain = "portolan.internal".parse().unwrap();
        explained(name, &domain, &Asker::new("shop", "web", &slices).unwrap(), &slices, &networks)
    }

    #[test]
    fn pods_and_why_they_are_answered() {
        let text = ask("db.backend");
        assert!(text.starts_with("db.backend, asked by pod shop/web on node a (networks: backend)"), "{text}");
        let row = |pod| {
            text.lines().find(|line: &&str| line.starts_with(pod)).unwrap().split_whitespace().collect::<Vec<_>>()
        };
        assert_eq!(row("shop/db-0"), ["shop/db-0", "a", "10.32.0.2", "yes"], "where it is Ready");
        assert_eq!(row("shop/db-1").join(" "), "shop/db-1 b 10.32.0.3 no: it is not Ready");
    }

    #[test]
    fn both_addresses_are_told_and_names_of_pods_without_ipv4() {
        let mut slices = slices();
        let pod = &mut slices[1].spec.endpoints[0];
        pod.second_address = Some("fd32::3".into());
        let web = &mut slices[0].spec.endpoints[0];
        web.address = "fd32::1".into();
        let spec = json!({"metadata": {"name": "backend"}, "spec": {"subnets": ["10.32.0.0/16", "fd32::/64"]}});
        let networks = [serde_json::from_value(spec).unwrap()];
        let (asker, domain) = (Asker::new("shop", "web", &slices).unwrap(), "portolan.internal".parse().unwrap());
        let ask = |name: &str| explained(name, &domain, &asker, &slices, &networks);
        let text = ask("db.backend");
        assert!(
            text.lines().any(|line| line.starts_with("shop/db-1") && line.contains("10.32.0.3,fd32::3 ")),
            "{text}"
        );
        assert!(ask("fd32::3").contains("db-1.shop.backend"));
        assert!(ask("web.backend").lines().any(|line| line.starts_with("shop/web") && line.contains("fd32::1 ")));
    }

    #[test]
    fn names_that_nobody_has() {
        assert!(ask("db-1.backend").contains("none of its pods is Ready"));
        assert!(ask("nobody.backend").contains("NXDOMAIN"));
        assert!(ask("db.default").contains("Forwarded to the cluster's DNS"));
        assert!(ask("10.32.0.3").contains("db-1.shop.backend"));
    }

    #[test]
    fn full_names() {
        assert!(ask("db.backend.portolan.internal").contains("10.32.0.2"));
        assert!(ask("nobody.backend.portolan.internal.").contains("NXDOMAIN"));
        assert!(ask("db.frontend.portolan.internal").contains("Forwarded to the cluster's DNS"));
        assert!(ask("portolan.internal").contains("only longer names end in this one"));
    }

    #[test]
    fn a_pod_without_networks_is_told_so() {
        let error = Asker::new("shop", "other", &slices()).err().unwrap().to_string();
        assert!(error.contains("shop/other") && error.contains("portolan.dev/networks"), "{error}");
    }

    #[test]
    fn a_pod_that_asks_elsewhere_is_told_so() {
        let pod = |spec| serde_json::from_value::<Pod>(json!({"metadata": {}, "spec": spec})).unwrap();
        let note = note_on_settings(&pod(json!({"containers": [], "dnsPolicy": "Default"}))).unwrap();
        assert!(note.contains("Default") && note.contains(SERVER), "{note}");
        let config =
            json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": [SERVER, "10.96.0.10"]}});
        assert_eq!(note_on_settings(&pod(config)), None);
    }
}
