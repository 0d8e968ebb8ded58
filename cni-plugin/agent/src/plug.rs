//! ADD, DEL, CHECK, GC and STATUS.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use k8s_openapi::api::core::v1::Pod;
use kube::{Resource, ResourceExt};
use portolan_cni::{Answer, Attachment, Command, Failure, Request};
use portolan_crds::NETWORKS_ANNOTATION;
use portolan_net::endpoint_mac;

use crate::{
    addresses::{Holder, Reservation},
    agent::Agent,
    annotation::{self, Wish},
    collect::{UnplugError, unplug},
    error::PlugError,
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
            Command::Delete => self.unplug_container(&request.container).await,
            Command::Check => self.check(&request.container).await,
            Command::Collect => self.collect_unlisted(request.attachments.as_deref()).await,
            Command::Status | Command::Version => self.status(),
        };
        if request.command == Command::Add {
            self.metrics.cni_add.observe(started.elapsed().as_secs_f64());
        }
        if let Err(failure) = &result {
            tracing::warn!(command = ?request.command, container = request.container, code = failure.code, msg = failure.msg, "refused");
        }
        Answer { error: result.err() }
    }

    async fn add(&self, request: &Request) -> Result<(), Failure> {
        let (Some(name), Some(netns)) = (&request.pod, &request.netns) else {
            let msg = "the request names no pod or no network namespace";
            return Err(Failure::new(Failure::INVALID_ENVIRONMENT, msg, ""));
        };
        let pod = self.cluster.pod(name).await.map_err(|e| e.failure())?;
        let Some(text) = pod.annotations().get(NETWORKS_ANNOTATION) else { return Ok(()) };
        for error in names::errors(&pod) {
            self.events.warning(&pod.object_ref(&()), "NameLeftOut", "Plug", &error.to_string()).await;
        }
        match self.plug(&request.container, netns.into(), &pod, text).await {
            Ok(()) if missed::is_missed(&pod, &self.namespace) => {
                self.events.warning(&pod.object_ref(&()), missed::REASON, "Plug", &missed::message(&pod)).await;
                Ok(())
            }
            Ok(()) => Ok(()),
            Err(error) => {
                self.events.warning(&pod.object_ref(&()), "NotPlugged", "Plug", &error.to_string()).await;
                Err(error.failure())
            }
        }
    }

    async fn plug(&self, container: &str, netns: PathBuf, pod: &Pod, text: &str) -> Result<(), PlugError> {
        if !self.is_synced() {
            return Err(PlugError::NotSynced);
        }
        let wishes = annotation::parse(text)?;
        // All networks and addresses first: the frequent mistakes cost nothing.
        let mut networks = Vec::new();
        for wish in &wishes {
            networks.push(self.cluster.network(&wish.network).await?);
        }
        refuse_overlaps(&networks)?;
        let mut plans = Vec::new();
        for (position, (wish, network)) in wishes.iter().zip(networks).enumerate() {
            let (endpoint, reservation) = self.plan(container, &netns, pod, wish, &network, position == 0).await?;
            plans.push((network, endpoint, reservation));
        }
        for (network, endpoint, _) in &plans {
            if let Err(error) = self.plug_one(network, endpoint).await {
                self.roll_back(container).await;
                return Err(error);
            }
        }
        self.changed.notify_one();
        Ok(())
    }

    /// Nothing half-made stays of a pod that was refused.
    async fn roll_back(&self, container: &str) {
        if let Err(error) = self.unplug_container(container).await {
            tracing::warn!(container, error = error.msg, "what was made of a refused pod stays for the collection");
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
        let (addresses, asks_from, reservation) = match self.journal.select(same).first() {
            Some(before) => (before.addresses().collect(), before.asks_from, None),
            None => {
                let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
                let set = pod::stateful_set(pod);
                let holder = Holder { namespace: &namespace, pod: &name, stateful_set: set.as_ref(), resolver };
                let reservation = self.addresses.acquire(network, &holder).await?;
                (reservation.addresses.clone(), reservation.asks_from, Some(reservation))
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
            mac: endpoint_mac(&network.name, first.addr()),
            mtu: network.mtu(self.underlay),
            resolver,
            namespace: pod.namespace().unwrap_or_default(),
            pod: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            owner: pod::owner(pod).map(|o| o.name),
        };
        Ok((endpoint, reservation))
    }

    async fn plug_one(&self, network: &Network, endpoint: &Endpoint) -> Result<(), PlugError> {
        self.evict(endpoint).await?;
        // First on disk: a port that the journal doesn't know is taken for a leftover.
        self.journal.put(endpoint.clone())?;
        let mut applied = self.applied.lock().await;
        self.ensure_network(&mut applied, network.spec(self.underlay)).await?;
        self.dataplane.add_port(&endpoint.port()).await?;
        Ok(())
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

    async fn unplug(&self, endpoint: &Endpoint) -> Result<(), UnplugError> {
        let _right = self.applied.lock().await;
        unplug(&self.dataplane, &self.journal, endpoint).await?;
        self.changed.notify_one();
        Ok(())
    }

    async fn unplug_container(&self, container: &str) -> Result<(), Failure> {
        for endpoint in self.journal.select(|e| e.container == container) {
            self.unplug(&endpoint).await.map_err(|e| PlugError::from(e).failure())?;
        }
        Ok(())
    }

    async fn check(&self, container: &str) -> Result<(), Failure> {
        for endpoint in self.journal.select(|e| e.container == container) {
            let checked = self.dataplane.check_port(&endpoint.port()).await;
            checked.map_err(|e| Failure::new(Failure::NOT_PLUGGED, e.to_string(), ""))?;
        }
        Ok(())
    }

    /// GC: what the runtime doesn't list is gone. Without a list, nothing is.
    async fn collect_unlisted(&self, attachments: Option<&[Attachment]>) -> Result<(), Failure> {
        let Some(listed) = attachments else { return Ok(()) };
        let unlisted = |e: &Endpoint| listed.iter().all(|a| a.container != e.container);
        for endpoint in self.journal.select(unlisted) {
            self.unplug(&endpoint).await.map_err(|e| PlugError::from(e).failure())?;
        }
        Ok(())
    }

    fn status(&self) -> Result<(), Failure> {
        if self.is_synced() {
            return Ok(());
        }
        Err(Failure::new(Failure::NOT_AVAILABLE, PlugError::NotSynced.to_string(), ""))
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
