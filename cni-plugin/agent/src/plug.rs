//! ADD, DEL, CHECK, GC and STATUS.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::{Resource, ResourceExt};
use portolan_cni::{Answer, Attached, Attachment, Command, Failure, Request};
use portolan_crds::NETWORKS_ANNOTATION;
use portolan_net::{Allowed, Mac, block_of, endpoint_mac, gateway, is_endpoint_mac};

use crate::{
    addresses::{Holder, Reservation},
    agent::Agent,
    annotation::{self, Wish},
    collect::{UnplugError, unplug},
    error::PlugError,
    hotplug,
    journal::Endpoint,
    missed, names,
    network::Network,
    pod,
};

impl Agent {
    /// Answers one request of the CNI plugin.
    pub(crate) async fn answer(&self, request: Request) -> Answer {
        let started = Instant::now();
        let result = match request.command {
            Command::Add => self.add(&request).await,
            Command::Delete => self.delete(&request).await.map(|()| None),
            Command::Check => self.check(&request).await.map(|()| None),
            Command::Collect => self.collect_unlisted(request.attachments.as_deref()).await.map(|()| None),
            Command::Status | Command::Version => self.status().await.map(|()| None),
        };
        if request.command == Command::Add {
            self.metrics.cni_add.observe(started.elapsed().as_secs_f64());
        }
        if let Err(failure) = &result {
            tracing::warn!(command = ?request.command, container = request.container, code = failure.code, msg = failure.msg, "refused");
        }
        match result {
            Ok(result) => Answer { result, error: None },
            Err(failure) => Answer { result: None, error: Some(failure) },
        }
    }

    async fn add(&self, request: &Request) -> Result<Option<Attached>, Failure> {
        let (Some(name), Some(netns)) = (&request.pod, &request.netns) else {
            let msg = "the request names no pod or no network namespace";
            return Err(Failure::new(Failure::INVALID_ENVIRONMENT, msg, ""));
        };
        self.wait_for_news().await;
        let pod = self.pod_named(name).await.map_err(|e| e.failure())?;
        if !request.primary {
            return self.add_to_networks(&request.container, netns, &pod).await.map(|()| None);
        }
        let (attached, is_new) = match self.attach_if_primary(request, netns.as_ref(), &pod).await {
            Ok(attached) => attached,
            Err(error) => return Err(self.refuse(&pod, &error).await),
        };
        if let Err(failure) = self.add_to_networks(&request.container, netns, &pod).await {
            if is_new && let Err(error) = self.detach(&request.container).await {
                tracing::warn!(pod = pod.name_any(), %error, "what was made of a refused pod stays for the collection");
            }
            return Err(failure);
        }
        Ok(Some(attached))
    }

    async fn attach_if_primary(
        &self,
        request: &Request,
        netns: &Path,
        pod: &Pod,
    ) -> Result<(Attached, bool), PlugError> {
        match self.primary.is_enabled() {
            true => self.attach(request, netns, pod).await,
            false => Err(PlugError::NotPrimary),
        }
    }

    /// Tells the pod's Events why it can't be plugged in, and returns what the runtime is told.
    async fn refuse(&self, pod: &Pod, error: &PlugError) -> Failure {
        if self.is_synced() {
            let (about, message) = (pod.object_ref(&()), error.to_string());
            self.events.warning(&about, "NotPlugged", "Plug", &message).await;
        }
        error.failure()
    }

    /// Plugs a pod into the networks that its annotation names.
    async fn add_to_networks(&self, container: &str, netns: &str, pod: &Arc<Pod>) -> Result<(), Failure> {
        let Some(text) = pod.annotations().get(NETWORKS_ANNOTATION) else { return Ok(()) };
        for error in names::errors(pod).iter().filter(|_| self.is_synced()) {
            self.events.warning(&pod.object_ref(&()), "NameLeftOut", "Plug", &error.to_string()).await;
        }
        let Some(_busy) = self.busy.enter(&pod.uid().unwrap_or_default()) else {
            return Err(PlugError::Busy.failure());
        };
        match self.plug(container, netns.into(), pod, text).await {
            Ok(()) if self.is_synced() && missed::is_missed(pod, &self.namespace) && self.redirect.get().is_none() => {
                self.events.warning(&pod.object_ref(&()), missed::REASON, "Plug", &missed::message(pod)).await;
                Ok(())
            }
            Ok(()) => Ok(()),
            Err(error) => Err(self.refuse(pod, &error).await),
        }
    }

    async fn plug(&self, container: &str, netns: PathBuf, pod: &Pod, text: &str) -> Result<(), PlugError> {
        if !self.is_synced() && !self.is_alone() {
            return Err(PlugError::NotSynced);
        }
        let wishes = annotation::parse(text)?;
        self.plug_all(container, &netns, pod, &wishes, &[]).await.map(drop)
    }

    /// Plugs a pod into all of these networks or into none, beside those that it is on. The first of all is where it reaches the DNS server.
    pub(crate) async fn plug_all(
        &self,
        container: &str,
        netns: &Path,
        pod: &Pod,
        wishes: &[Wish],
        present: &[Endpoint],
    ) -> Result<Vec<Endpoint>, PlugError> {
        let allowed = annotation::allowed(pod)?;
        // All networks and addresses first: the frequent mistakes cost nothing.
        let mut networks = Vec::new();
        for name in wishes.iter().map(|wish| &wish.network).chain(present.iter().map(|there| &there.network)) {
            networks.push(self.network_named(name).await?);
        }
        refuse_overlaps(&networks)?;
        let mut plans = Vec::new();
        for (wish, network) in wishes.iter().zip(&networks) {
            refuse_gateways(wish, network)?;
        }
        for (position, (wish, network)) in wishes.iter().zip(networks).enumerate() {
            let is_first = position == 0 && present.is_empty();
            let (mut endpoint, reservation) = self.plan(container, netns, pod, wish, &network, is_first).await?;
            endpoint.allowed.clone_from(&allowed);
            plans.push((network, endpoint, reservation));
        }
        for (network, endpoint, _) in &plans {
            if let Err(error) = self.plug_one(network, endpoint).await {
                self.roll_back(plans.iter().map(|(_, endpoint, _)| endpoint)).await;
                return Err(error);
            }
        }
        self.changed.notify_one();
        Ok(plans.into_iter().map(|(_, endpoint, _)| endpoint).collect())
    }

    /// Nothing half-made stays of what was refused.
    async fn roll_back(&self, endpoints: impl Iterator<Item = &Endpoint>) {
        for endpoint in endpoints {
            if let Err(error) = self.unplug(endpoint).await {
                let (pod, network) = (&endpoint.pod, &endpoint.network);
                tracing::warn!(pod, network, %error, "what was made of a refused pod stays for the collection");
            }
        }
    }

    async fn plan(
        &self,
        container: &str,
        netns: &Path,
        pod: &Pod,
        wish: &Wish,
        network: &Network,
        resolver: bool,
    ) -> Result<(Endpoint, Option<Reservation>), PlugError> {
        let same =
            |e: &Endpoint| e.container == container && e.interface == wish.interface && e.network == network.name;
        // The runtime asks again: the same answer.
        let (addresses, asks_from, redirected, mac, reservation) = match self.journal.select(same).first() {
            Some(there) => (there.addresses().collect(), there.asks_from, there.redirected, Some(there.mac), None),
            None => {
                let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
                self.check_mac(network, wish, (&namespace, &name))?;
                let set = pod::stateful_set(pod);
                let uid = pod.uid().unwrap_or_default();
                let holder = Holder {
                    namespace: &namespace,
                    pod: &name,
                    uid: &uid,
                    stateful_set: set.as_ref(),
                    resolver,
                    asked: &wish.addresses,
                };
                let reservation = match self.is_alone() {
                    true => self.addresses.again(network, &holder).await?,
                    false => self.addresses.acquire(network, &holder).await?,
                };
                let redirected = if resolver { self.redirected(pod, &network.name) } else { None };
                let addresses = reservation.addresses.clone();
                (addresses, reservation.asks_from, redirected, wish.mac, Some(reservation))
            }
        };
        let mut addresses = network.with_prefixes(&addresses);
        let none = || PlugError::NotReady { network: network.name.clone(), reason: "its subnets have changed".into() };
        let first = addresses.next().ok_or_else(none)?;
        let endpoint = Endpoint {
            container: container.to_owned(),
            netns: netns.to_path_buf(),
            interface: wish.interface.clone(),
            network: network.name.clone(),
            vni: network.vni,
            address: first.addr(),
            prefix: first.prefix_len(),
            second: addresses.next(),
            asks_from,
            mac: mac.unwrap_or_else(|| endpoint_mac(&network.name, first.addr())),
            mtu: network.mtu(self.underlay),
            resolver,
            redirected,
            allowed: Allowed::default(),
            bandwidth: wish.bandwidth,
            gateways: wish.gateways.clone(),
            namespace: pod.namespace().unwrap_or_default(),
            pod: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            owner: pod::owner(pod).map(|o| o.name),
        };
        Ok((endpoint, reservation))
    }

    /// Where a pod asks that should ask our DNS server and doesn't, if it is to reach it there. An agent that can't ask where that is goes by what the
    /// pod had.
    fn redirected(&self, pod: &Pod, network: &str) -> Option<Ipv4Addr> {
        if !self.redirects || !missed::is_missed(pod, &self.namespace) {
            return None;
        }
        let had = || self.known.had(&pod.uid().unwrap_or_default(), network)?.redirected;
        self.redirect.get().copied().or_else(had)
    }

    /// Whether a MAC that a pod asks for is no other port's, as far as this node knows: those that are made from addresses never are.
    fn check_mac(&self, network: &Network, wish: &Wish, pod: (&str, &str)) -> Result<(), PlugError> {
        let Some(mac) = wish.mac else { return Ok(()) };
        if is_endpoint_mac(&network.name, mac) {
            let reason = "isn't made from an address: another first byte than 02, or another second one".to_owned();
            return Err(PlugError::MacTaken { network: network.name.clone(), mac, reason });
        }
        let (slices, text) = (self.cluster.slices.state(), mac.to_string());
        // Of this node's own pods the journal knows first who has gone.
        let others = slices.iter().filter(|s| s.spec.network == network.name && s.spec.node != self.cluster.node);
        let there = others.flat_map(|slice| &slice.spec.endpoints);
        let there = there.filter(|e| e.mac == text).map(|e| (e.namespace.clone(), e.pod.clone()));
        refuse_mac_of(there, &network.name, mac, pod)?;
        self.check_mac_here(&network.name, mac, pod)
    }

    /// The same among the pods of this node.
    fn check_mac_here(&self, network: &str, mac: Mac, pod: (&str, &str)) -> Result<(), PlugError> {
        let here = self.journal.select(|e| e.network == network && e.mac == mac);
        refuse_mac_of(here.into_iter().map(|e| (e.namespace, e.pod)), network, mac, pod)
    }

    async fn plug_one(&self, network: &Network, endpoint: &Endpoint) -> Result<(), PlugError> {
        self.evict(endpoint).await?;
        let _turn = self.turns.take(&endpoint.id()).await;
        // First on disk: a port that the journal doesn't know is taken for a leftover.
        self.record(endpoint).await?;
        let _right = self.prepare(network).await?;
        self.dataplane.add_port(&endpoint.port()).await?;
        Ok(())
    }

    /// Puts an endpoint into the journal, unless another pod got the MAC that it asks for first.
    async fn record(&self, endpoint: &Endpoint) -> Result<(), PlugError> {
        let _right = self.applied.read().await;
        // Those that are made from addresses are nobody else's.
        if is_endpoint_mac(&endpoint.network, endpoint.mac) {
            return Ok(self.journal.put(endpoint.clone())?);
        }
        let _one_at_a_time = self.macs.lock().await;
        self.check_mac_here(&endpoint.network, endpoint.mac, (&endpoint.namespace, &endpoint.pod))?;
        Ok(self.journal.put(endpoint.clone())?)
    }

    /// An earlier sandbox of the same pod may still have the address. Another pod's is never taken.
    async fn evict(&self, endpoint: &Endpoint) -> Result<(), PlugError> {
        let shared = |e: &Endpoint| e.addresses().find(|address| endpoint.addresses().any(|own| own == *address));
        let same_address =
            |e: &Endpoint| e.network == endpoint.network && e.container != endpoint.container && shared(e).is_some();
        for before in self.journal.select(same_address) {
            if (&before.namespace, &before.pod) != (&endpoint.namespace, &endpoint.pod) {
                return Err(PlugError::AddressInUse {
                    network: endpoint.network.clone(),
                    address: shared(&before).unwrap_or(endpoint.address),
                    holder: format!("{}/{}", before.namespace, before.pod),
                });
            }
            self.unplug(&before).await?;
        }
        Ok(())
    }

    pub(crate) async fn unplug(&self, endpoint: &Endpoint) -> Result<(), UnplugError> {
        let _turn = self.turns.take(&endpoint.id()).await;
        let _right = self.applied.read().await;
        // Whoever had the turn before may have done it, and the address may be another port's by now.
        if self.journal.select(|e| e.id() == endpoint.id()).is_empty() {
            return Ok(());
        }
        unplug(&self.dataplane, &self.journal, endpoint).await?;
        self.changed.notify_one();
        Ok(())
    }

    async fn delete(&self, request: &Request) -> Result<(), Failure> {
        if let Some(uid) = request.pod.as_ref().and_then(|pod| pod.uid.as_deref()) {
            self.unplug_container(&hotplug::container_of(uid)).await?;
        }
        self.unplug_container(&request.container).await?;
        // Whatever the configuration says by now: the pod may have been plugged in under another one.
        self.detach(&request.container).await.map_err(|e| PlugError::from(e).failure())
    }

    async fn unplug_container(&self, container: &str) -> Result<(), Failure> {
        for endpoint in self.journal.select(|e| e.container == container) {
            self.unplug(&endpoint).await.map_err(|e| PlugError::from(e).failure())?;
        }
        Ok(())
    }

    async fn check(&self, request: &Request) -> Result<(), Failure> {
        if request.primary {
            self.check_attached(request).await?;
        }
        for endpoint in self.journal.select(|e| e.container == request.container) {
            let checked = self.dataplane.check_port(&endpoint.port()).await;
            checked.map_err(|e| Failure::new(Failure::NOT_PLUGGED, e.to_string(), ""))?;
            if !self.has_its_rules(&*self.applied.read().await, endpoint.vni) {
                self.changed.notify_one();
                return Err(PlugError::RulesChanged { network: endpoint.network }.failure());
            }
        }
        Ok(())
    }

    /// GC: what the runtime doesn't list is gone. Without a list, nothing is.
    async fn collect_unlisted(&self, attachments: Option<&[Attachment]>) -> Result<(), Failure> {
        let Some(listed) = attachments else { return Ok(()) };
        self.detach_unlisted(listed).await.map_err(|e| PlugError::from(e).failure())?;
        // The runtime knows nothing of those that it asked no ADD for: they go with their namespace.
        let unlisted =
            |e: &Endpoint| listed.iter().all(|a| a.container != e.container) && !hotplug::is_ours(&e.container);
        for endpoint in self.journal.select(unlisted) {
            self.unplug(&endpoint).await.map_err(|e| PlugError::from(e).failure())?;
        }
        Ok(())
    }

    async fn status(&self) -> Result<(), Failure> {
        let can_serve = self.is_synced() || self.is_alone();
        let serving = if can_serve { self.check_serving().await } else { Err(PlugError::NotSynced) };
        serving.map_err(|error| Failure::new(Failure::NOT_AVAILABLE, error.to_string(), ""))
    }
}

/// An error if one of those who have a MAC is another pod.
fn refuse_mac_of(
    mut holders: impl Iterator<Item = (String, String)>,
    network: &str,
    mac: Mac,
    pod: (&str, &str),
) -> Result<(), PlugError> {
    match holders.find(|(namespace, name)| (namespace.as_str(), name.as_str()) != pod) {
        Some((namespace, name)) => {
            let reason = format!("no other pod has: {namespace}/{name} has it");
            Err(PlugError::MacTaken { network: network.to_owned(), mac, reason })
        }
        None => Ok(()),
    }
}

/// A pod is sent to the outside only by networks that may lead there, and by somebody who is on them.
pub(crate) fn refuse_gateways(wish: &Wish, network: &Network) -> Result<(), PlugError> {
    let (name, Some(first)) = (&network.name, wish.gateways.first()) else { return Ok(()) };
    if !network.egress {
        return Err(PlugError::NoEgress { network: name.clone(), gateway: *first });
    }
    let is_foreign = |address: &&IpAddr| {
        let is_hosts = |subnet: &IpNet| {
            subnet.contains(*address) && (gateway(*subnet) == **address || block_of(*subnet, **address).is_some())
        };
        wish.addresses.contains(*address) || !network.subnets.iter().any(is_hosts)
    };
    match wish.gateways.iter().find(is_foreign) {
        Some(address) => {
            let gateways: Vec<String> = network.subnets.iter().map(|subnet| gateway(*subnet).to_string()).collect();
            let gateways = gateways.join(" or ");
            Err(PlugError::ForeignGateway { network: name.clone(), gateway: *address, gateways })
        }
        None => Ok(()),
    }
}

/// Two interfaces with overlapping subnets in one pod: the kernel would use the first for both.
fn refuse_overlaps(networks: &[Network]) -> Result<(), PlugError> {
    for (position, one) in networks.iter().enumerate() {
        for other in networks.iter().skip(position + 1) {
            for (a, b) in one.subnets.iter().flat_map(|a| other.subnets.iter().map(move |b| (a, b))) {
                if a.contains(b) || b.contains(a) {
                    let (one, other) = (format!("{} ({a})", one.name), format!("{} ({b})", other.name));
                    return Err(PlugError::Overlap { one, other });
                }
            }
        }
    }
    Ok(())
}
