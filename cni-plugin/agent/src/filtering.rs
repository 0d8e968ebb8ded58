//! Makes the kernel follow the NetworkPolicies.

use std::sync::Arc;

use k8s_openapi::api::{core::v1::Namespace, networking::v1::NetworkPolicy};
use kube::ResourceExt;
use portolan_net::{Filter, Generation, PortFilter, port_name};
use tokio::sync::RwLockReadGuard;

use crate::{
    agent::Agent,
    error::PlugError,
    journal::Endpoint,
    network::Network,
    policy::{Policies, is_about},
    sync::{Applied, of_network},
    view::{Local, View},
};

/// What was set last of what may pass at a network's ports, and at which change of the kernel's rules that was.
pub(crate) struct Filtering {
    wanted: Filter,
    /// None where nobody is isolated: then nothing of ours can be changed.
    at: Option<Generation>,
}

impl Applied {
    /// What was set to pass at a port; none if nothing was set of its network.
    pub fn filter_at(&self, vni: u32, port: &str) -> Option<PortFilter> {
        let filtering = self.filters.get(&vni)?;
        Some(filtering.wanted.ports.get(port).cloned().unwrap_or_default())
    }

    /// Notes that changes of our own beside the filter were made to rules which the kernel had as they were set.
    pub fn rules_are_at(&mut self, vni: u32, generation: Generation) {
        if let Some(at) = self.filters.get_mut(&vni).and_then(|filtering| filtering.at.as_mut()) {
            *at = generation;
        }
    }
}

impl Agent {
    /// What may pass at a network's ports, for all endpoints that the journal has.
    pub(crate) fn filter_of(&self, network: &str) -> Filter {
        let policies = self.cluster.policies.state();
        // As a rule there are none, and then nobody needs to be looked at.
        if !policies.iter().any(|policy| is_about(policy, network)) {
            return Filter::default();
        }
        let endpoints = self.journal.select(|e| e.network == network);
        let local = self.local(&endpoints);
        let slices = self.cluster.slices.state();
        let view = View::new(&self.cluster.node, &local, of_network(&slices, network));
        self.wanted_filter(network, &endpoints, &local, &view)
    }

    /// Waits until a network is what it is to be, for all endpoints that the journal has: a port's first frame meets its rules. Returns the right
    /// to change the network's ports, before anybody may change the network again.
    pub(crate) async fn prepare(&self, network: &Network) -> Result<RwLockReadGuard<'_, Applied>, PlugError> {
        if self.is_alone() {
            return self.prepare_alone(network).await;
        }
        let spec = self.spec(network);
        let applied = self.applied.read().await;
        let is_routed = !spec.gateway || applied.ways.contains_key(&spec.vni);
        // A pass may have made its devices while nothing leads out of where they are.
        let is_led_out = !spec.encrypted || applied.encrypting.is_made();
        let is_there = is_routed && is_led_out && applied.has(&spec) && self.dataplane.namespace(spec.vni).is_ok();
        if is_there && self.has_filter(&applied, spec.vni, &self.filter_of(&network.name)) {
            return Ok(applied);
        }
        drop(applied);
        let (mut applied, vni) = (self.applied.write().await, spec.vni);
        if network.encrypted {
            let failed = |source| PlugError::Encryption { network: network.name.clone(), source };
            self.encrypt(&mut applied, Some(&network.name)).await.map_err(failed)?;
        }
        self.ensure_network(&mut applied, spec).await?;
        let wanted = self.filter_of(&network.name);
        self.set_filter(&mut applied, (&network.name, vni), wanted).await?;
        if network.egress {
            // A pod that doesn't reach the outside starts all the same: it is told of the network.
            let _ = self.follow_egress(&mut applied, network).await;
        }
        Ok(applied.downgrade())
    }

    fn wanted_filter(&self, network: &str, endpoints: &[Endpoint], local: &[Local], view: &View<'_>) -> Filter {
        let policies = self.cluster.policies.state();
        let policies: Vec<&NetworkPolicy> =
            policies.iter().map(AsRef::as_ref).filter(|policy| is_about(policy, network)).collect();
        if policies.is_empty() {
            return Filter::default();
        }
        let namespaces = self.cluster.namespaces.state();
        let namespaces = namespaces.iter().map(|it: &Arc<Namespace>| (it.name_any(), it.labels().clone()));
        let ports = endpoints.iter().map(|e| port_name(&e.container, &e.interface));
        let ports = ports.zip(local.iter().map(|local| &local.endpoint));
        Policies::new(policies, namespaces, view.endpoints()).filter(ports)
    }

    /// Whether the kernel has the rules that were set last for a network, all its ports being open otherwise.
    pub(crate) fn has_its_rules(&self, applied: &Applied, vni: u32) -> bool {
        applied.filters.get(&vni).is_none_or(|filtering| self.is_untouched(vni, filtering))
    }

    fn has_filter(&self, applied: &Applied, vni: u32, wanted: &Filter) -> bool {
        let before = applied.filters.get(&vni);
        before.is_some_and(|before| before.wanted == *wanted && self.is_untouched(vni, before))
    }

    fn is_untouched(&self, vni: u32, filtering: &Filtering) -> bool {
        filtering.at.is_none_or(|at| self.dataplane.generation(vni).is_ok_and(|now| now == at))
    }

    /// Makes what may pass at a network's ports what is wanted, if that isn't what was set last, or somebody has changed the rules since.
    pub(crate) async fn set_filter(
        &self,
        applied: &mut Applied,
        (network, vni): (&str, u32),
        wanted: Filter,
    ) -> portolan_net::Result<()> {
        if self.has_filter(applied, vni, &wanted) {
            return Ok(());
        }
        // Until it is done, it isn't known which of the two the kernel has.
        applied.filters.remove(&vni);
        self.dataplane.filter(vni, &wanted).await?;
        tracing::debug!(network, isolated = wanted.ports.len(), "policies");
        let at = if wanted.ports.is_empty() { None } else { Some(self.dataplane.generation(vni)?) };
        applied.filters.insert(vni, Filtering { wanted, at });
        Ok(())
    }
}
