//! Agents that start while nothing gets through to the API.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use serde_json::json;

use super::{Pod, Start, World};
use crate::{addresses::Holder, known::Had};

impl World {
    pub(super) fn known_of(&self, node: &str) -> PathBuf {
        self.root.path().join(format!("{node}.known"))
    }

    /// The node's watches catch up, and what its agent knows is written down.
    pub(super) fn see(&mut self, node: usize) {
        let there: Vec<&Pod> = self.pods.values().filter(|pod| pod.node == node).collect();
        let it = &mut self.nodes[node];
        it.view.see();
        if it.agent.is_none() {
            return;
        }
        it.is_alone = false;
        it.kubelet.retain(|uid, _| there.iter().any(|pod| pod.uid == *uid));
        let object = |pod: &&Pod| {
            let metadata = json!({"name": pod.name, "namespace": "shop", "uid": pod.uid});
            Arc::new(serde_json::from_value(json!({ "metadata": metadata })).unwrap())
        };
        let objects: Vec<_> = there.iter().map(object).collect();
        let journal = Arc::clone(&it.journal);
        let has = |uid: &str| -> BTreeMap<String, Had> {
            let had = |addresses| Had { addresses, ..Had::default() };
            let endpoints = journal.select(|e| e.uid == uid);
            endpoints.iter().map(|e| (e.network.clone(), had(e.addresses().collect()))).collect()
        };
        it.known.follow(&objects, has, Vec::new()).unwrap();
    }

    /// A kubelet makes another sandbox for a pod that it knows, whose earlier one may have ended; its agent is alone.
    pub(super) fn add_again(&mut self) {
        let alone: Vec<usize> = (0..self.nodes.len()).filter(|node| self.nodes[*node].is_alone).collect();
        let Some(node) = alone.get(self.random.below(alone.len())).copied() else { return };
        let it = &self.nodes[node];
        let which = self.random.below(it.kubelet.len());
        let Some(pod) = it.kubelet.values().nth(which).cloned() else { return };
        let Some(agent) = it.agent.clone() else { return };
        if self.random.chance(5000) {
            self.nodes[node].journal.select(|e| e.uid == pod.uid).iter().for_each(|e| self.end_sandbox(&e.container));
        }
        let (network, of) = (Arc::clone(&self.network), pod.clone());
        let job = Box::pin(async move {
            let (stateful_set, asked) = (of.set.as_ref(), &of.asked[..]);
            let holder = Holder { namespace: "shop", pod: &of.name, uid: &of.uid, stateful_set, resolver: true, asked };
            agent.again(&network, &holder).await
        });
        self.starts.push(Start { pod, job });
    }
}
