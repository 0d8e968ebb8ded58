//! CNI's verbs for the interface that Portolan gives a pod where no other plugin does.

use std::{collections::BTreeSet, path::Path};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use portolan_cni::{Attached, Attachment, Failure, Request};
use portolan_net::Namespace;

use super::record::{PodRecord, attached, id};
use crate::{agent::Agent, collect::UnplugError, error::PlugError, store::Kept};

impl Agent {
    /// Gives a pod its interface on the pod network. Asked again it answers the same. Returns also whether it is new; of a new one nothing is left
    /// after a failure.
    pub(crate) async fn attach(
        &self,
        request: &Request,
        netns: &Path,
        pod: &Pod,
    ) -> Result<(Attached, bool), PlugError> {
        let id = id(&request.container, &request.interface);
        let _turn = self.turns.take(&turn(&id)).await;
        // Nothing is collected meanwhile.
        let _right = self.applied.read().await;
        let network = self.primary.network().await?;
        let known = self.primary.pods.select(|pod| pod.id() == id).pop();
        let is_new = known.is_none();
        let record = match known {
            Some(known) => {
                let ports = request.port_mappings.clone();
                let record = PodRecord { netns: netns.to_owned(), ports, leaving: false, ..known.clone() };
                if record != known {
                    self.primary.pods.put(record.clone())?;
                }
                record
            }
            None => {
                let record = PodRecord {
                    container: request.container.clone(),
                    netns: netns.to_owned(),
                    interface: request.interface.clone(),
                    addresses: Vec::new(),
                    mtu: network.mtu,
                    ports: request.port_mappings.clone(),
                    leaving: false,
                    namespace: pod.namespace().unwrap_or_default(),
                    pod: pod.name_any(),
                };
                self.primary.give(record, &network).await?
            }
        };
        let spec = record.spec(&network);
        let linked = async {
            self.dataplane.add_pod(&spec).await?;
            // Nobody is led to a pod that isn't there.
            self.primary.follow_ports(&self.dataplane).await
        };
        if let Err(error) = linked.await {
            if is_new && let Err(second) = self.primary.take_off(&self.dataplane, &record).await {
                tracing::warn!(pod = record.pod, error = %second, "what was made of a refused pod stays for the collection");
            }
            return Err(error.into());
        }
        Ok((attached(&spec), is_new))
    }

    /// Takes off what a container has on the pod network; it is right if that is nothing.
    pub(crate) async fn detach(&self, container: &str) -> Result<(), UnplugError> {
        for pod in self.primary.pods.select(|pod| pod.container == container) {
            self.detach_one(&pod).await?;
        }
        Ok(())
    }

    async fn detach_one(&self, pod: &PodRecord) -> Result<(), UnplugError> {
        let _turn = self.turns.take(&turn(&pod.id())).await;
        let _right = self.applied.read().await;
        // Whoever had the turn before may have done it.
        match self.primary.pods.select(|there| there.id() == pod.id()).first() {
            Some(there) => self.primary.take_off(&self.dataplane, there).await,
            None => Ok(()),
        }
    }

    /// Whether a container has what ADD gave it.
    pub(crate) async fn check_attached(&self, request: &Request) -> Result<(), Failure> {
        let id = id(&request.container, &request.interface);
        let Some(pod) = self.primary.pods.select(|pod| pod.id() == id).pop() else {
            let msg = format!("container {} has no interface {} of Portolan's", request.container, request.interface);
            return Err(Failure::new(Failure::NOT_PLUGGED, msg, ""));
        };
        let network = self.primary.network().await.map_err(|e| e.failure())?;
        let checked = self.dataplane.check_pod(&pod.spec(&network)).await;
        checked.map_err(|e| Failure::new(Failure::NOT_PLUGGED, e.to_string(), ""))
    }

    /// Takes off what the runtime doesn't list.
    pub(crate) async fn detach_unlisted(&self, listed: &[Attachment]) -> Result<(), UnplugError> {
        let is_listed =
            |pod: &PodRecord| listed.iter().any(|it| it.container == pod.container && it.interface == pod.interface);
        for pod in self.primary.pods.select(|pod| !is_listed(pod)) {
            self.detach_one(&pod).await?;
        }
        Ok(())
    }

    /// Whether pods can be given interfaces.
    pub(crate) async fn check_serving(&self) -> Result<(), PlugError> {
        match self.primary.is_enabled() {
            true => self.primary.network().await.map(drop),
            false => Ok(()),
        }
    }

    /// After a start: links of the journal that the kernel lost, or that were never finished, or that an older release made.
    pub(super) async fn restore_pods(&self, unchecked: &mut BTreeSet<String>) {
        let Ok(network) = self.primary.network().await else {
            if !self.primary.is_enabled() {
                unchecked.clear();
            }
            return;
        };
        for id in std::mem::take(unchecked) {
            let _turn = self.turns.take(&turn(&id)).await;
            let _right = self.applied.read().await;
            let known = self.primary.pods.select(|pod| pod.id() == id && !pod.leaving).pop();
            // Those whose namespace is gone are collected.
            let Some(pod) = known.filter(|pod| !Namespace::is_gone(self.dataplane.root(), &pod.netns)) else {
                continue;
            };
            let spec = pod.spec(&network);
            if self.dataplane.check_pod(&spec).await.is_ok() {
                continue;
            }
            match self.dataplane.add_pod(&spec).await {
                Ok(()) => tracing::info!(pod = pod.pod, "link restored"),
                Err(error) => {
                    tracing::warn!(pod = pod.pod, %error, "link not restored");
                    unchecked.insert(id);
                }
            }
        }
    }
}

/// In turns with whoever changes the same interface. Networks' interfaces have turns of their own.
fn turn(id: &str) -> String {
    format!("pod network {id}")
}
