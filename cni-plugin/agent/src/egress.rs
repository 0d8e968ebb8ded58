//! Networks' ways outside: gives and takes them as ContainerNetworks say.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use portolan_net::{Egress, NetworkSpec, gateway};

use crate::{
    agent::Agent,
    network::Network,
    sync::{Applied, of_network},
};

/// How often the kernel is made what is wanted without a cause: somebody may have flushed the host's rules.
const INTERVAL: Duration = Duration::from_secs(60);

/// What was done since the agent started, by network.
pub(crate) type Ways = BTreeMap<u32, Way>;

/// One network's way outside.
pub(crate) struct Way {
    /// None if it was taken away.
    wanted: Option<Egress>,
    /// Why packets get nowhere all the same.
    problem: Option<String>,
    at: Instant,
}

impl Agent {
    /// What a network is to be on this node. It has no gateway while a pod has that address.
    pub(crate) fn spec(&self, network: &Network) -> NetworkSpec {
        let mut spec = network.spec(self.underlay);
        spec.gateway &= self.gateway_holder(network).is_none();
        spec
    }

    /// The pod that has the address of one of a network's gateways.
    fn gateway_holder(&self, network: &Network) -> Option<String> {
        if !network.egress {
            return None;
        }
        let gateways: Vec<IpAddr> = network.subnets.iter().copied().map(gateway).collect();
        let is_gateway = |address: IpAddr| gateways.contains(&address);
        let here = self.journal.select(|e| e.network == network.name && e.addresses().any(is_gateway));
        if let Some(endpoint) = here.first() {
            return Some(format!("{}/{}", endpoint.namespace, endpoint.pod));
        }
        let slices = self.cluster.slices.state();
        // Of this node's own pods the journal knows first who has gone.
        let others = of_network(&slices, &network.name).filter(|slice| slice.spec.node != self.cluster.node);
        let mut endpoints = others.flat_map(|slice| &slice.spec.endpoints);
        let holder = endpoints.find(|endpoint| endpoint.addresses().any(is_gateway))?;
        Some(format!("{}/{}", holder.namespace, holder.pod))
    }

    /// Gives a network that is set up its way outside, or takes it away. Nothing else of the network waits for that: returns why there is none,
    /// where there is to be one.
    pub(crate) async fn follow_egress(&self, applied: &mut Applied, network: &Network) -> Option<String> {
        let spec = self.spec(network);
        let egress = Egress { vni: spec.vni, mtu: spec.mtu, subnets: network.subnets.clone(), tunnel_port: spec.port };
        let wanted = spec.gateway.then_some(egress);
        if let Some(way) = applied.ways.get(&spec.vni)
            && way.wanted == wanted
            && (wanted.is_none() || way.at.elapsed() < INTERVAL)
        {
            return way.problem.clone();
        }
        let has_its_rules = self.has_its_rules(applied, spec.vni);
        let done = match &wanted {
            Some(egress) => self.dataplane.ensure_egress(egress).await,
            None => self.dataplane.remove_egress(spec.vni, &network.subnets).await.map(|()| Vec::new()),
        };
        if has_its_rules && let Ok(generation) = self.dataplane.generation(spec.vni) {
            applied.rules_are_at(spec.vni, generation);
        }
        match done {
            Ok(obstacles) => {
                let texts: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
                let problem = (!texts.is_empty()).then(|| texts.join("; "));
                let before = applied.ways.get(&spec.vni);
                if let Some(problem) = &problem
                    && before.is_none_or(|before| before.problem.as_ref() != Some(problem))
                {
                    tracing::warn!(network = network.name, problem, "pods don't reach the outside");
                }
                applied.ways.insert(spec.vni, Way { wanted, problem: problem.clone(), at: Instant::now() });
                problem
            }
            Err(error) => {
                applied.ways.remove(&spec.vni);
                tracing::warn!(network = network.name, %error, "the way outside is not as it should be");
                Some(error.to_string())
            }
        }
    }
}
