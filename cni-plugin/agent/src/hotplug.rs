//! Pods whose networks change while they run: somebody changed the annotation, or the pod was started before this node's agent was there, so that
//! the container runtime never asked for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Pod;
use kube::{Resource, ResourceExt};
use portolan_crds::NETWORKS_ANNOTATION;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    annotation::{self, Wish},
    error::PlugError,
    journal::Endpoint,
    plug::refuse_gateways,
    pod,
};

/// How often the pods of this node are looked at.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long a pod that can't be plugged in is left alone.
const RETRY: Duration = Duration::from_secs(15);
/// How long a pod's address may be in no namespace before that is told: its sandbox is being made anew, as a rule, and the runtime will ask.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the journal knows a pod by whose container the runtime never told us, before the pod's UID.
const UNTOLD: &str = "untold.";

/// What a pod's endpoints are journaled under if the runtime asked no ADD for them.
pub(crate) fn container_of(uid: &str) -> String {
    format!("{UNTOLD}{uid}")
}

/// Whether it is a container's name that we have given.
pub(crate) fn is_ours(container: &str) -> bool {
    container.starts_with(UNTOLD)
}

/// The pods whose networks are being changed, by their UIDs: one at a time may do that.
#[derive(Default)]
pub(crate) struct Busy(Arc<Mutex<BTreeSet<String>>>);

/// The right to change one pod's networks.
pub(crate) struct Turn {
    all: Arc<Mutex<BTreeSet<String>>>,
    uid: String,
}

impl Busy {
    /// None if somebody has it.
    pub fn enter(&self, uid: &str) -> Option<Turn> {
        lock(&self.0).insert(uid.to_owned()).then(|| Turn { all: Arc::clone(&self.0), uid: uid.to_owned() })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.all).remove(&self.uid);
    }
}

fn lock(all: &Mutex<BTreeSet<String>>) -> MutexGuard<'_, BTreeSet<String>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is to be done about a pod.
#[derive(Debug, Default, Eq, PartialEq)]
struct Changes {
    unplug: Vec<Endpoint>,
    plug: Vec<Wish>,
    /// What stays, and may receive or send at another rate, or is a default route by somebody else.
    limit: Vec<Endpoint>,
    /// Where it reaches the DNS server from now on, as the interface where it did goes.
    resolver: Option<Endpoint>,
}

/// From what the annotation wants and what is there. A network that stays keeps its interface, whatever its place in the annotation is now. An
/// interface that isn't named gets the first free name if its own is taken.
fn changes(wishes: &[Wish], present: &[Endpoint]) -> Changes {
    let is_wanted = |there: &&Endpoint| wishes.iter().any(|wish| wish.network == there.network);
    let (stay, unplug): (Vec<&Endpoint>, Vec<&Endpoint>) = present.iter().partition(is_wanted);
    let limited = |there: &Endpoint| {
        let wish = wishes.iter().find(|wish| wish.network == there.network);
        let Some(wish) = wish else { return there.clone() };
        Endpoint { bandwidth: wish.bandwidth, gateways: wish.gateways.clone(), ..there.clone() }
    };
    let limit = stay.iter().map(|there| limited(there)).filter(|after| !stay.contains(&after)).collect();
    let new = wishes.iter().filter(|wish| stay.iter().all(|there| there.network != wish.network));
    let mut taken: BTreeSet<String> = stay.iter().map(|there| there.interface.clone()).collect();
    let mut plug: Vec<Wish> = new.cloned().collect();
    taken.extend(plug.iter().filter(|wish| wish.named).map(|wish| wish.interface.clone()));
    for wish in plug.iter_mut().filter(|wish| !wish.named) {
        let free = std::iter::once(wish.interface.clone()).chain((1..).map(|n| format!("eth{n}")));
        wish.interface = free.into_iter().find(|name| !taken.contains(name)).unwrap_or_default();
        taken.insert(wish.interface.clone());
    }
    let loses = unplug.iter().any(|there| there.resolver) && !stay.iter().any(|there| there.resolver);
    // What has no IPv4 address has nothing to ask from: such a pod asks the cluster's DNS until it is plugged in anew.
    let next = stay.iter().find(|there| loses && there.address.is_ipv4());
    let redirected = unplug.iter().find_map(|there| there.redirected);
    let resolver = next.map(|there| Endpoint { resolver: true, redirected, ..limited(there) });
    Changes { unplug: unplug.into_iter().cloned().collect(), plug, limit, resolver }
}

/// Whether a pod runs in a network namespace of its own, which is not on its way out.
fn runs(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let on_host = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    pod::is_current(pod) && !on_host && matches!(phase, "Running" | "Pending") && pod::address(pod).is_some()
}

/// A pod's UID and annotation.
type Asked = (String, Option<String>);

/// Since when a pod can't be given what it asks for, and when that was tried last.
#[derive(Clone, Copy)]
struct Failing {
    since: Instant,
    last: Instant,
}

/// Follows the annotations until the agent ends.
pub(crate) async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let mut failing: BTreeMap<Asked, Failing> = BTreeMap::new();
    loop {
        let pods = agent.cluster.pods.state();
        let mut before = std::mem::take(&mut failing);
        for pod in pods.iter().filter(|pod| runs(pod)) {
            let asked = (pod.uid().unwrap_or_default(), pod.annotations().get(NETWORKS_ANNOTATION).cloned());
            let known = before.remove(&asked);
            if let Some(waits) = known.filter(|known| known.last.elapsed() < RETRY) {
                failing.insert(asked, waits);
            } else if let Err(error) = agent.follow_annotation(pod, &asked.0, asked.1.as_deref()).await {
                let now = Instant::now();
                let since = known.map_or(now, |known| known.since);
                failing.insert(asked, Failing { since, last: now });
                if matches!(error, PlugError::NoNamespace(_)) && since.elapsed() < PATIENCE {
                    continue;
                }
                tracing::warn!(pod = pod.name_any(), %error, "a running pod's networks are not what it asks for");
                agent.events.warning(&pod.object_ref(&()), "NotPlugged", "Plug", &error.to_string()).await;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

impl Agent {
    /// Plugs a running pod in and out as its annotation says.
    async fn follow_annotation(&self, pod: &Pod, uid: &str, asked: Option<&str>) -> Result<(), PlugError> {
        let Some(_turn) = self.busy.enter(uid) else { return Ok(()) };
        let present = self.journal.select(|e| e.uid == uid);
        let wishes = asked.map(annotation::parse).transpose()?.unwrap_or_default();
        let changes = changes(&wishes, &present);
        if changes == Changes::default() {
            return Ok(());
        }
        let (container, netns) = match present.first() {
            Some(there) => (there.container.clone(), there.netns.clone()),
            None => (container_of(uid), self.namespace_of(pod).await?),
        };
        for endpoint in &changes.unplug {
            self.unplug(endpoint).await?;
            let done = format!("unplugged from {} ({})", endpoint.network, endpoint.interface);
            self.events.normal(&pod.object_ref(&()), "Unplugged", "Plug", &done).await;
        }
        let stay: Vec<Endpoint> = present.into_iter().filter(|there| !changes.unplug.contains(there)).collect();
        for wish in wishes.iter().filter(|wish| !wish.gateways.is_empty()) {
            refuse_gateways(wish, &self.cluster.network(&wish.network).await?)?;
        }
        for endpoint in changes.limit {
            let of = format!("{} ({})", endpoint.network, endpoint.interface);
            let before = stay.iter().find(|there| there.id() == endpoint.id());
            let is_routed_anew = before.is_some_and(|before| before.gateways != endpoint.gateways);
            let is_limited_anew = before.is_some_and(|before| before.bandwidth != endpoint.bandwidth);
            self.change(endpoint).await?;
            if is_limited_anew {
                let done = format!("bandwidth on {of} changed");
                self.events.normal(&pod.object_ref(&()), "Limited", "Plug", &done).await;
            }
            if is_routed_anew {
                let done = format!("default route by {of} changed");
                self.events.normal(&pod.object_ref(&()), "Routed", "Plug", &done).await;
            }
        }
        if let Some(endpoint) = changes.resolver {
            self.change(endpoint).await?;
        }
        for endpoint in self.plug_all(&container, &netns, pod, &changes.plug, &stay).await? {
            let done = format!("plugged into {} ({}: {})", endpoint.network, endpoint.interface, endpoint.address);
            self.events.normal(&pod.object_ref(&()), "Plugged", "Plug", &done).await;
        }
        Ok(())
    }

    /// Where the runtime has put a pod that it never told us of.
    async fn namespace_of(&self, pod: &Pod) -> Result<PathBuf, PlugError> {
        let address = pod::address(pod).ok_or_else(|| PlugError::NoPod(pod.name_any()))?;
        self.dataplane.namespace_with(address).await?.ok_or(PlugError::NoNamespace(address))
    }

    /// Makes a port what its endpoint is from now on.
    async fn change(&self, endpoint: Endpoint) -> Result<(), PlugError> {
        let port = endpoint.port();
        // Whoever follows other annotations of the pod reads and writes the journal with the same right.
        let _right = self.applied.write().await;
        self.journal.put(endpoint)?;
        self.dataplane.add_port(&port).await?;
        self.changed.notify_one();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use portolan_net::{Allowed, Bandwidth, Limit, Mac};
    use serde_json::json;

    use super::*;

    fn endpoint(network: &str, interface: &str, resolver: bool) -> Endpoint {
        Endpoint {
            container: "c".into(),
            netns: "/run/netns/c".into(),
            interface: interface.into(),
            network: network.into(),
            vni: 77,
            address: IpAddr::from([10, 32, 0, 5]),
            prefix: 16,
            second: None,
            asks_from: None,
            mac: Mac::default(),
            mtu: 1450,
            resolver,
            redirected: None,
            allowed: Allowed::default(),
            bandwidth: Bandwidth::default(),
            gateways: Vec::new(),
            namespace: "shop".into(),
            pod: "web-0".into(),
            uid: "u".into(),
            owner: None,
        }
    }

    fn plugged(changes: &Changes) -> Vec<(&str, &str)> {
        changes.plug.iter().map(|wish| (wish.network.as_str(), wish.interface.as_str())).collect()
    }

    #[test]
    fn what_is_there_stays_and_the_rest_follows() {
        let wishes = |text: &str| annotation::parse(text).unwrap();
        let both = [endpoint("backend", "eth1", true), endpoint("frontend", "eth2", false)];
        assert_eq!(changes(&wishes("backend, frontend"), &both), Changes::default());
        assert_eq!(changes(&wishes("frontend, backend"), &both), Changes::default(), "in any order");
        assert_eq!(changes(&[], &[]), Changes::default());
        assert_eq!(plugged(&changes(&wishes("backend"), &[])), [("backend", "eth1")]);
        assert_eq!(plugged(&changes(&wishes("new, backend"), &both[..1])), [("new", "eth2")], "eth1 is taken");
        assert_eq!(
            plugged(&changes(&wishes("new@net0, other, backend"), &both[..1])),
            [("new", "net0"), ("other", "eth2")]
        );
        let gone = changes(&[], &both);
        assert_eq!((gone.unplug.len(), gone.resolver), (2, None));
    }

    #[test]
    fn the_resolver_is_reached_by_what_stays() {
        let both = [endpoint("backend", "eth1", true), endpoint("frontend", "eth2", false)];
        let less = changes(&annotation::parse("frontend").unwrap(), &both);
        assert_eq!(less.unplug, [both[0].clone()]);
        assert_eq!(less.resolver, Some(Endpoint { resolver: true, ..both[1].clone() }));
        let kept = changes(&annotation::parse("backend").unwrap(), &both);
        assert_eq!((kept.unplug.len(), kept.resolver), (1, None));
    }

    #[test]
    fn what_stays_has_the_bandwidth_that_is_asked_for() {
        let wishes = |text: &str| annotation::parse(text).unwrap();
        let both = [endpoint("backend", "eth1", true), endpoint("frontend", "eth2", false)];
        let limited = r#"[{"name":"backend"},{"name":"frontend","bandwidth":{"egressRate":8000000}}]"#;
        let asked = changes(&wishes(limited), &both);
        let mut after = both.clone();
        after[1].bandwidth.egress = Some(Limit { rate: 8_000_000, burst: 800_000 });
        assert_eq!(asked, Changes { limit: vec![after[1].clone()], ..Changes::default() });
        assert_eq!(changes(&wishes(limited), &after), Changes::default(), "it is so");
        let back = changes(&wishes("backend, frontend"), &after);
        assert_eq!(back, Changes { limit: vec![both[1].clone()], ..Changes::default() });
        let alone = changes(&wishes(&limited.replace(r#"{"name":"backend"},"#, "")), &both);
        assert_eq!(alone.resolver, Some(Endpoint { resolver: true, ..after[1].clone() }), "with the limit");
    }

    #[test]
    fn one_at_a_time_changes_a_pod() {
        let busy = Busy::default();
        let turn = busy.enter("a");
        assert!(turn.is_some() && busy.enter("a").is_none() && busy.enter("b").is_some());
        drop(turn);
        assert!(busy.enter("a").is_some());
    }

    #[test]
    fn who_runs() {
        let pod = |value| serde_json::from_value::<Pod>(value).unwrap();
        let status = json!({"phase": "Running", "podIP": "10.244.1.7"});
        let spec = |host: bool| json!({"containers": [], "hostNetwork": host});
        assert!(runs(&pod(json!({"metadata": {}, "spec": spec(false), "status": status}))));
        assert!(!runs(&pod(json!({"metadata": {}, "spec": spec(true), "status": status}))));
        assert!(!runs(&pod(json!({"metadata": {}, "spec": spec(false), "status": {"phase": "Pending"}}))), "not yet");
        let going = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(!runs(&pod(json!({"metadata": going, "spec": spec(false), "status": status}))));
        let done = json!({"phase": "Succeeded", "podIP": "10.244.1.7"});
        assert!(!runs(&pod(json!({"metadata": {}, "spec": spec(false), "status": done}))));
    }
}
