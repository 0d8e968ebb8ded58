//! The pods' annotation `k8s.v1.cni.cncf.io/network-status` (Network Plumbing Working Group, "Kubernetes Network Custom Resource Definition De-facto
//! Standard", 1.3): which interface is on which network, with which addresses. Told from the slices, so that no pod waits for it.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use portolan_crds::{Endpoint, NetworkNodeSlice};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::network::{gather, notify};

const ANNOTATION: &str = "k8s.v1.cni.cncf.io/network-status";
/// How our entries' names begin; the others are those of Multus and its like.
const OURS: &str = "portolan/";
/// How long changes are gathered before a pass.
const GATHER: Duration = Duration::from_millis(500);
/// A pass is made at least this often.
const RESYNC: Duration = Duration::from_secs(60);
/// After a pass in which a pod could not be told.
const RETRY: Duration = Duration::from_secs(5);
/// How many pods are told at a time.
const AT_ONCE: usize = 8;

/// One interface, in the standard's words.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct Entry {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<String>,
    ips: Vec<String>,
    mac: String,
    dns: BTreeMap<String, String>,
}

impl Entry {
    fn of(network: &str, endpoint: &Endpoint) -> Self {
        Self {
            name: format!("{OURS}{network}"),
            interface: endpoint.interface.clone(),
            ips: endpoint.addresses().map(|address| address.to_string()).collect(),
            mac: endpoint.mac.clone(),
            dns: BTreeMap::new(),
        }
    }
}

/// Namespace and name.
type Name = (String, String);

/// What a pod is to be told. Another pod of the same name on the same node may have the same entries; it isn't Ready at first.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Wanted {
    node: String,
    ready: bool,
    entries: Vec<Entry>,
}

/// Tells pods until `stop` is cancelled.
pub async fn run(client: Client, stop: CancellationToken) {
    let (changed, mut changes) = mpsc::channel(1);
    let (slices, writer) = reflector::store::<NetworkNodeSlice>();
    let events = watcher(Api::<NetworkNodeSlice>::all(client.clone()), watcher::Config::default());
    let events = events.default_backoff().reflect(writer);
    let work = async {
        // Before the first list is complete a pod might be told of some of its networks only.
        if slices.wait_until_ready().await.is_err() {
            return;
        }
        let mut told = HashMap::new();
        loop {
            let wait = match pass(&client, &slices, &mut told).await {
                Ok(()) => RESYNC,
                Err(error) => {
                    tracing::warn!(%error, "a pod could not be told of its networks");
                    RETRY
                }
            };
            gather(&mut changes, wait, GATHER).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
        () = notify(events, &changed) => {}
    }
}

async fn pass(client: &Client, slices: &Store<NetworkNodeSlice>, told: &mut HashMap<Name, Wanted>) -> kube::Result<()> {
    let slices = slices.state();
    let wanted = wanted(slices.iter().map(AsRef::as_ref));
    // Those that are on no network any more may go on.
    let gone = told.keys().filter(|name| !wanted.contains_key(*name)).map(|name| (name.clone(), None));
    let new = wanted.iter().filter(|(name, wanted)| told.get(*name) != Some(wanted));
    let new = new.map(|(name, wanted)| (name.clone(), Some(wanted.clone())));
    let all: Vec<(Name, Option<Wanted>)> = gone.chain(new).collect();
    let done = futures::stream::iter(all).map(|(name, wanted)| async move {
        let entries = wanted.as_ref().map_or(&[][..], |wanted| &wanted.entries);
        tell(client, &name, entries).await.map(|()| (name, wanted))
    });
    let mut done = done.buffer_unordered(AT_ONCE);
    while let Some((name, wanted)) = done.try_next().await? {
        match wanted {
            Some(wanted) => told.insert(name, wanted),
            None => told.remove(&name),
        };
    }
    Ok(())
}

/// What each pod is to be told, its interfaces in their order.
fn wanted<'a>(slices: impl Iterator<Item = &'a NetworkNodeSlice>) -> BTreeMap<Name, Wanted> {
    let mut all: BTreeMap<Name, Wanted> = BTreeMap::new();
    for slice in slices {
        for endpoint in &slice.spec.endpoints {
            let name = (endpoint.namespace.clone(), endpoint.pod.clone());
            let new = Wanted { node: slice.spec.node.clone(), ready: endpoint.ready, entries: Vec::new() };
            let pod = all.entry(name).or_insert(new);
            pod.entries.push(Entry::of(&slice.spec.network, endpoint));
        }
    }
    for pod in all.values_mut() {
        pod.entries.sort_by(|a, b| (&a.interface, &a.name).cmp(&(&b.interface, &b.name)));
    }
    all
}

async fn tell(client: &Client, (namespace, name): &Name, entries: &[Entry]) -> kube::Result<()> {
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let Some(pod) = pods.get_metadata_opt(name).await? else { return Ok(()) };
    let Some(annotation) = merged(pod.annotations().get(ANNOTATION).map(String::as_str), entries) else {
        return Ok(());
    };
    // Multus may write at the same time.
    let patch = json!({ "metadata": {
        "resourceVersion": pod.resource_version(), "uid": pod.uid(), "annotations": { ANNOTATION: annotation },
    } });
    match pods.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

/// The annotation with our entries instead of those that are there; none if it has them already, or is something that can't be added to.
fn merged(present: Option<&str>, ours: &[Entry]) -> Option<String> {
    let present: Vec<Value> = match present {
        Some(text) => serde_json::from_str(text).ok()?,
        None => Vec::new(),
    };
    let is_ours = |entry: &Value| entry["name"].as_str().is_some_and(|name| name.starts_with(OURS));
    let mut all: Vec<Value> = present.iter().filter(|entry| !is_ours(entry)).cloned().collect();
    for entry in ours {
        all.push(serde_json::to_value(entry).ok()?);
    }
    (all != present).then(|| Value::Array(all).to_string())
}

#[cfg(test)]
mod tests {
    use portolan_crds::NetworkNodeSliceSpec;

    use super::*;

    fn slice(network: &str, interface: &str, address: &str) -> NetworkNodeSlice {
        let endpoint = Endpoint {
            address: address.into(),
            second_address: Some("fd32::5".into()),
            mac: "02:00:00:00:00:05".into(),
            namespace: "shop".into(),
            pod: "db-0".into(),
            interface: Some(interface.into()),
            ..Endpoint::default()
        };
        let spec = NetworkNodeSliceSpec {
            network: network.into(),
            node: "a".into(),
            endpoints: vec![endpoint],
            ..NetworkNodeSliceSpec::default()
        };
        NetworkNodeSlice::new(network, spec)
    }

    fn entries() -> Vec<Entry> {
        let slices = [slice("frontend", "eth2", "10.33.0.5"), slice("backend", "eth1", "10.32.0.5")];
        let all = wanted(slices.iter());
        assert_eq!(all.keys().collect::<Vec<_>>(), [&("shop".to_owned(), "db-0".to_owned())]);
        all.into_values().next().unwrap().entries
    }

    #[test]
    fn a_pod_is_told_of_each_interface() {
        let told: Value = serde_json::from_str(&merged(None, &entries()).unwrap()).unwrap();
        let expected = json!({
            "name": "portolan/backend", "interface": "eth1", "ips": ["10.32.0.5", "fd32::5"],
            "mac": "02:00:00:00:00:05", "dns": {},
        });
        assert_eq!(told[0], expected);
        assert_eq!((&told[1]["name"], told.as_array().unwrap().len()), (&json!("portolan/frontend"), 2));
    }

    #[test]
    fn others_entries_stay_and_ours_are_replaced() {
        let multus = json!({ "name": "cluster", "interface": "eth0", "ips": ["10.0.0.9"], "default": true, "dns": {} });
        let old =
            json!({ "name": "portolan/backend", "interface": "eth1", "ips": ["10.32.0.4"], "mac": "", "dns": {} });
        let once = merged(Some(&json!([multus, old]).to_string()), &entries()).unwrap();
        let told: Vec<Value> = serde_json::from_str(&once).unwrap();
        assert_eq!((&told[0], told.len()), (&multus, 3));
        assert_eq!(told[1]["ips"][0], "10.32.0.5");
        assert_eq!(merged(Some(&once), &entries()), None, "nothing to write");
        assert_eq!(merged(Some(&once), &[]).unwrap(), json!([multus]).to_string(), "on no network any more");
        assert_eq!(merged(None, &[]), None);
        assert_eq!(merged(Some("not a list"), &entries()), None, "somebody else's");
    }
}
