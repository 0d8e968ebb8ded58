//! What happens to agents, machines and Node objects.

use std::sync::{Arc, atomic::Ordering};

use portolan_operator::garbage::QUARANTINE;

use super::{Start, World};
use crate::{addresses::Addresses, journal::Journal, known::Known};

impl World {
    pub(super) fn crash_agent(&mut self, node: usize) {
        self.counts.crashes += 1;
        self.nodes[node].agent = None;
        self.release.retain(|(of, _)| *of != node);
        let (gone, stay) = std::mem::take(&mut self.starts).into_iter().partition(|start| start.pod.node == node);
        self.starts = stay;
        let gone: Vec<Start> = gone;
        for start in gone {
            if let Some(pod) = self.pods.get_mut(&start.pod.name).filter(|pod| pod.node == node) {
                pod.is_starting = false;
            }
        }
    }

    /// It has heard everything once, and knows of its journal what is on disk.
    pub(super) fn start_agent(&mut self, node: usize) {
        let known = self.known_of(&self.nodes[node].name);
        let it = &mut self.nodes[node];
        if it.agent.is_some() || !it.is_on {
            return;
        }
        // Then it knows what the last one wrote down.
        it.is_alone = it.view.is_cut();
        if !it.is_alone {
            it.view.see();
        }
        it.known = Arc::new(Known::open(&known).unwrap());
        it.journal = Arc::new(Journal::open(self.root.path().join(&it.name)).unwrap());
        it.agent = Some(Arc::new(Addresses::new(Arc::clone(&it.view), Arc::clone(&it.journal), Arc::clone(&it.known))));
    }

    /// It is on again at once, without what ran on it.
    pub(super) fn crash_machine(&mut self, node: usize) {
        if self.nodes[node].is_on {
            self.crash_agent(node);
            self.nodes[node].journal.select(|_| true).iter().for_each(|e| self.end_sandbox(&e.container));
            self.nodes[node].kubelet.clear();
            // As the next agent does that finds what is of another boot.
            let _ = std::fs::remove_dir_all(self.known_of(&self.nodes[node].name));
        }
    }

    pub(super) fn cut(&mut self, node: usize, is_cut: bool) {
        self.nodes[node].view.is_cut.store(is_cut, Ordering::Relaxed);
    }

    /// Its pods are no more to the API; they go on for less than the quarantine, whether it hears of that or not.
    pub(super) fn delete_node(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        if !it.is_there || !it.is_on {
            return;
        }
        self.counts.nodes_deleted += 1;
        it.is_there = false;
        self.ends.insert((self.now + self.random.next() % (QUARANTINE.as_secs() - 5), node));
        self.server.lock().unwrap().nodes.remove(&it.name);
        let lost: Vec<String> = self.pods.values().filter(|pod| pod.node == node).map(|pod| pod.name.clone()).collect();
        lost.iter().for_each(|name| self.remove_object(name));
    }

    pub(super) fn power_off(&mut self, node: usize) {
        self.crash_machine(node);
        self.nodes[node].is_on = false;
    }

    /// A machine that was off registers again.
    pub(super) fn return_node(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        if it.is_on {
            return;
        }
        (it.is_on, it.is_there) = (true, true);
        it.view.is_cut.store(false, Ordering::Relaxed);
        self.server.lock().unwrap().nodes.insert(it.name.clone());
        self.start_agent(node);
    }

    /// As the sync does it when the last pod has left the network.
    pub(super) fn release(&mut self, node: usize) {
        let it = &self.nodes[node];
        let Some(agent) = it.agent.clone().filter(|_| it.journal.select(|_| true).is_empty()) else { return };
        self.release.push((node, Box::pin(async move { drop(agent.release("n").await) })));
    }
}
