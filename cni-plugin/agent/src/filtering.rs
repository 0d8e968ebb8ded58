//! Makes the kernel follow the NetworkPolicies.

use std::sync::Arc;

use k8s_openapi::api::{core::v1::Namespace, networking::v1::NetworkPolicy};
use kube::ResourceExt;
use portolan_net::{Filter, port_name};

use crate::{
    agent::Agent,
    journal::Endpoint,
    policy::{Policies, is_about},
    sync::{Applied, of_network},
    view::{Local, View},
};

impl Agent {
    /// The same as [`Self::filter`], for all endpoints of a network that the journal has.
    pub(crate) async fn filter_network(
        &self,
        applied: &mut Applied,
        network: &str,
        vni: u32,
    ) -> portolan_net::Result<()> {
        let endpoints = self.journal.select(|e| e.network == network);
        let local = self.local(&endpoints);
        let slices = self.cluster.slices.state();
        let view = View::new(&self.cluster.node, &local, of_network(&slices, network));
        self.filter(applied, (network, vni), &endpoints, &local, &view).await
    }

    /// Makes what may pass at a network's ports what the policies say, if that isn't what was set last. `local` is what `endpoints` are, in
    /// the same order.
    pub(crate) async fn filter(
        &self,
        applied: &mut Applied,
        (network, vni): (&str, u32),
        endpoints: &[Endpoint],
        local: &[Local],
        view: &View,
    ) -> portolan_net::Result<()> {
        let policies = self.cluster.policies.state();
        let policies: Vec<&NetworkPolicy> =
            policies.iter().map(AsRef::as_ref).filter(|policy| is_about(policy, network)).collect();
        let wanted = match policies.is_empty() {
            true => Filter::default(),
            false => {
                let namespaces = self.cluster.namespaces.state();
                let namespaces = namespaces.iter().map(|it: &Arc<Namespace>| (it.name_any(), it.labels().clone()));
                let ports = endpoints.iter().map(|e| port_name(&e.container, &e.interface));
                let ports = ports.zip(local.iter().map(|local| &local.endpoint));
                Policies::new(policies, namespaces, view.endpoints()).filter(ports)
            }
        };
        if applied.filters.get(&vni) == Some(&wanted) {
            return Ok(());
        }
        // Until it is done, it isn't known which of the two the kernel has.
        applied.filters.remove(&vni);
        self.dataplane.filter(vni, &wanted).await?;
        tracing::debug!(network, isolated = wanted.ports.len(), "policies");
        applied.filters.insert(vni, wanted);
        Ok(())
    }
}
