//! Which of the other nodes answer. A node that lost its power says nothing to the API server, and Kubernetes takes the better
//! part of a minute to notice; its kernel's silence shows within seconds.
//!
//! Silence is no proof: nothing is taken away by it, names only prefer pods of nodes that answer.
//!
//! The same questions, but large, tell which paths carry less than pods may send. A kernel answers them whatever release of the agent its node has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use portolan_net::{Heard, Outcome, Paths, Pinger};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;

/// How often each node is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// So many questions in a row without an answer make a node silent: four seconds at most after its power is cut.
const UNANSWERED: u32 = 3;

/// What is known of the nodes that are asked, by tunnel endpoint. A node that never answered is not silent: a firewall may be in
/// the way.
#[derive(Debug, Default)]
pub(crate) struct Peers(Mutex<BTreeMap<IpAddr, Peer>>);

#[derive(Clone, Copy, Debug, Default)]
struct Peer {
    ever_answered: bool,
    /// Questions since the last answer. They are counted, not timed: an agent that had no processor for a while has asked nobody.
    unanswered: u32,
    silent: bool,
}

impl Peers {
    /// The nodes that answered once and don't any more.
    pub fn silent(&self) -> BTreeSet<IpAddr> {
        self.lock().iter().filter(|(_, peer)| peer.silent).map(|(node, _)| *node).collect()
    }

    /// The nodes that have answered since they were asked last.
    fn answering(&self) -> BTreeSet<IpAddr> {
        let answers = |peer: &Peer| peer.ever_answered && peer.unanswered == 0;
        self.lock().iter().filter(|(_, peer)| answers(peer)).map(|(node, _)| *node).collect()
    }

    /// Takes stock before each of `nodes` is asked again; others are forgotten. Returns those that became silent.
    fn take_stock(&self, nodes: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
        let mut peers = self.lock();
        peers.retain(|node, _| nodes.contains(node));
        let mut fell_silent = Vec::new();
        for node in nodes {
            let peer = peers.entry(*node).or_default();
            if peer.ever_answered && !peer.silent && peer.unanswered >= UNANSWERED {
                peer.silent = true;
                fell_silent.push(*node);
            }
            peer.unanswered = peer.unanswered.saturating_add(1);
        }
        fell_silent
    }

    /// A node answered. Returns whether it had been silent.
    fn answered(&self, node: IpAddr) -> bool {
        let mut peers = self.lock();
        let Some(peer) = peers.get_mut(&node) else { return false };
        let answers_again = peer.silent;
        *peer = Peer { ever_answered: true, unanswered: 0, silent: false };
        answers_again
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Peer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the nodes that share a network with this one until the agent ends.
pub(crate) async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let pinger = match Pinger::open(agent.underlay.vtep) {
        Ok(pinger) => pinger,
        Err(error) => {
            tracing::warn!(%error, "names of pods on dead nodes stay until Kubernetes notices, and no path's MTU is probed");
            agent.small_paths.publish(BTreeMap::new());
            return;
        }
    };
    let mut paths = Paths::new(agent.underlay.vtep, agent.small_paths.get());
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // Answers that have come are heard before anybody is called silent.
            biased;
            () = shutdown.cancelled() => return,
            heard = pinger.answer() => match heard {
                Ok(heard) => take_in(&agent, &mut paths, heard),
                Err(error) => {
                    tracing::debug!(%error, "hearing answers failed");
                    tokio::time::sleep(INTERVAL).await;
                }
            },
            _ = ticks.tick() => ask(&agent, &pinger, &mut paths).await,
        }
    }
}

fn take_in(agent: &Agent, paths: &mut Paths, heard: Heard) {
    match heard {
        Heard::Answer { node, size } => {
            paths.heard(node, size, Outcome::Passed);
            if agent.peers.answered(node) {
                tracing::info!(%node, "a node answers again");
                agent.changed.notify_one();
            }
        }
        Heard::TooBig { node, size, carries } => paths.heard(node, size, Outcome::TooBig(carries)),
    }
}

async fn ask(agent: &Agent, pinger: &Pinger, paths: &mut Paths) {
    let wanted = agent.wanted_sizes();
    let nodes: BTreeSet<IpAddr> = wanted.keys().copied().collect();
    // The large ones first: a small one that is answered was sent after them.
    for (node, size) in paths.tick(&wanted, &agent.peers.answering()) {
        match pinger.probe(node, size).await {
            Ok(true) => {}
            Ok(false) => paths.heard(node, size, Outcome::TooBig(None)),
            Err(error) => {
                tracing::debug!(%node, %error, "not probed");
                paths.heard(node, size, Outcome::Unknown);
            }
        }
    }
    if agent.small_paths.is_due(paths.too_small()) {
        agent.changed.notify_one();
    }
    let fell_silent = agent.peers.take_stock(&nodes);
    for node in &fell_silent {
        tracing::warn!(%node, "a node doesn't answer: names prefer pods of other nodes");
    }
    if !fell_silent.is_empty() {
        agent.changed.notify_one();
    }
    for node in nodes {
        // A node that is gone from the neighbour table is as good as one that doesn't answer.
        if let Err(error) = pinger.ask(node).await {
            tracing::debug!(%node, %error, "not asked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn seconds(peers: &Peers, count: u32) -> Vec<usize> {
        (0..count).map(|_| peers.take_stock(&BTreeSet::from([NODE])).len()).collect()
    }

    #[test]
    fn three_questions_without_an_answer_make_a_node_silent_once() {
        let peers = Peers::default();
        seconds(&peers, 1);
        assert!(!peers.answered(NODE), "it was never silent");
        assert_eq!(seconds(&peers, 6), [0, 0, 0, 1, 0, 0]);
        assert_eq!(peers.silent(), BTreeSet::from([NODE]));
        assert!(peers.answered(NODE));
        assert!(peers.silent().is_empty());
    }

    #[test]
    fn a_late_answer_counts() {
        let peers = Peers::default();
        for _ in 0..10 {
            assert_eq!(seconds(&peers, 3), [0, 0, 0]);
            peers.answered(NODE);
        }
    }

    #[test]
    fn a_node_that_never_answered_is_not_silent() {
        let peers = Peers::default();
        assert_eq!(seconds(&peers, 9), [0; 9]);
        assert!(peers.silent().is_empty());
    }

    #[test]
    fn a_node_without_common_networks_is_forgotten() {
        let peers = Peers::default();
        seconds(&peers, 1);
        peers.answered(NODE);
        seconds(&peers, 4);
        peers.take_stock(&BTreeSet::new());
        assert!(peers.silent().is_empty() && !peers.answered(NODE));
    }

    #[test]
    fn who_answers_does_so_since_the_last_question() {
        let peers = Peers::default();
        seconds(&peers, 1);
        assert!(peers.answering().is_empty());
        peers.answered(NODE);
        assert_eq!(peers.answering(), BTreeSet::from([NODE]));
        seconds(&peers, 1);
        assert!(peers.answering().is_empty());
    }
}
