//! Which keys a node of encrypted networks has. Pure.
//!
//! Keys have generations, of which the operator says which is the newest, one after the other. Two nodes talk by keys of the same one. A node
//! has two at most: of the newest, and of the one before it until nobody needs that any more. It sends by the newer key as soon as there was a
//! handshake by it, receives by both, and says by which it still sends to anyone.

use std::collections::BTreeSet;

/// What a node says of its keys.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Said {
    /// The generations of its keys.
    pub keys: BTreeSet<u32>,
    /// The oldest by which it may still send to anyone; 0 if it doesn't know yet.
    pub sends: u32,
}

/// The generations of which a node shall have keys if `newest` is the newest of all, by what it said itself and by what the nodes say that it
/// shares an encrypted network with.
pub(crate) fn wanted(own: &Said, peers: &[Said], newest: u32) -> BTreeSet<u32> {
    let before = newest.saturating_sub(1);
    let is_there = own.keys.contains(&newest) || own.keys.contains(&before);
    let keeps_former = if is_there {
        own.keys.contains(&before) && is_needed(before, own, peers)
    } else {
        // It comes, or was away for long: to nodes that haven't heard of the newest generation it speaks by the one before.
        peers.iter().any(|peer| peer.keys.contains(&before) && !peer.keys.contains(&newest))
    };
    [newest].into_iter().chain(keeps_former.then_some(before)).collect()
}

/// Whether packets may still come by the key of a generation, or go.
fn is_needed(generation: u32, own: &Said, peers: &[Said]) -> bool {
    peers.iter().any(|peer| peer.keys.contains(&generation) && (peer.sends <= generation || own.sends <= generation))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn said(keys: &[u32], sends: u32) -> Said {
        Said { keys: keys.iter().copied().collect(), sends }
    }

    fn set(keys: &[u32]) -> BTreeSet<u32> {
        keys.iter().copied().collect()
    }

    #[test]
    fn a_rotation_of_two_nodes_step_by_step() {
        let (old, both, new) = (said(&[1], 1), |sends| said(&[1, 2], sends), said(&[2], 2));
        assert_eq!(wanted(&Said::default(), &[], 1), set(&[1]));
        assert_eq!(wanted(&old, std::slice::from_ref(&old), 1), set(&[1]));
        assert_eq!(wanted(&old, std::slice::from_ref(&old), 2), set(&[1, 2]), "there is a new one");
        assert_eq!(wanted(&both(2), &[both(1)], 2), set(&[1, 2]), "packets may still come by the old key");
        assert_eq!(wanted(&both(1), &[both(2)], 2), set(&[1, 2]), "packets still go by the old key");
        assert_eq!(wanted(&both(0), &[both(2)], 2), set(&[1, 2]), "it isn't known by which");
        assert_eq!(wanted(&both(2), &[both(2)], 2), set(&[2]));
        assert_eq!(wanted(&both(1), std::slice::from_ref(&new), 2), set(&[2]), "the other has done it");
        assert_eq!(wanted(&old, &[], 2), set(&[2]), "nobody to talk to");
    }

    #[test]
    fn a_dead_nodes_key_stays() {
        let dead = said(&[1], 1);
        assert_eq!(wanted(&said(&[1, 2], 1), &[dead, said(&[1, 2], 1)], 2), set(&[1, 2]));
        assert_eq!(wanted(&said(&[1, 2], 2), &[said(&[1, 2], 2)], 2), set(&[2]), "it is gone");
    }

    #[test]
    fn who_comes_into_a_rotation_is_reached_by_all() {
        assert_eq!(wanted(&Said::default(), &[said(&[1, 2], 1), said(&[1], 1)], 2), set(&[1, 2]));
        assert_eq!(wanted(&Said::default(), &[said(&[1, 2], 1)], 2), set(&[2]));
        assert_eq!(wanted(&said(&[3], 3), &[said(&[7], 7), said(&[8], 8)], 8), set(&[7, 8]), "after a long time");
        assert_eq!(wanted(&said(&[7], 7), &[said(&[7], 7)], 1), set(&[1]), "the operator counts anew");
    }

    /// What a step does.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// A node's watch brings news of another.
        Look(usize, usize),
        /// A node's watch brings the newest generation.
        Hear(usize),
        /// A pass of a node's agent.
        Act(usize),
        /// A node's slices are written.
        Write(usize),
        /// The operator begins a new generation, if the last one is everywhere.
        Rotate,
        /// The node loses what its kernel knew of handshakes, and the agent what it knew at all.
        Reboot(usize),
    }

    const NODES: usize = 4;

    /// The nodes as they are: by index, and by pair where one knows of another.
    #[derive(Default)]
    struct Model {
        newest: u32,
        /// What the nodes have heard of that.
        heard: Vec<u32>,
        own: Vec<Said>,
        written: Vec<Said>,
        seen: BTreeMap<(usize, usize), Said>,
        /// (of, peer, generation): the key of the peer is configured.
        configured: BTreeSet<(usize, usize, u32)>,
        /// (of, peer, generation): there was a handshake.
        connected: BTreeSet<(usize, usize, u32)>,
        sends: BTreeMap<(usize, usize), u32>,
    }

    impl Model {
        fn new(edges: &BTreeSet<(usize, usize)>) -> Self {
            let nodes = vec![Said::default(); NODES];
            let mut model =
                Self { newest: 1, heard: vec![1; NODES], own: nodes.clone(), written: nodes, ..Self::default() };
            for (a, b) in edges {
                model.seen.insert((*a, *b), Said::default());
                model.seen.insert((*b, *a), Said::default());
            }
            model
        }

        fn peers(&self, node: usize) -> Vec<usize> {
            self.seen.keys().filter(|(of, _)| *of == node).map(|(_, peer)| *peer).collect()
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Look(of, peer) => {
                    let said = self.written[peer].clone();
                    self.seen.entry((of, peer)).and_modify(|it| *it = said);
                }
                Step::Hear(node) => self.heard[node] = self.newest,
                Step::Act(node) => self.act(node),
                Step::Write(node) => self.written[node] = self.own[node].clone(),
                Step::Rotate => {
                    let done = said(&[self.newest], self.newest);
                    let is_done = self.written.iter().all(|it| it.keys.is_empty() || *it == done);
                    // Rotations are hours apart, of which no watch is late.
                    let is_done = is_done && self.heard.iter().all(|it| *it == self.newest);
                    self.newest += u32::from(is_done);
                }
                Step::Reboot(node) => {
                    self.own[node].sends = 0;
                    self.configured.retain(|(of, _, _)| *of != node);
                    self.connected.retain(|(of, peer, _)| *of != node && *peer != node);
                    self.sends.retain(|(of, peer), _| *of != node && *peer != node);
                }
            }
            self.shake_hands();
        }

        fn act(&mut self, node: usize) {
            let peers = self.peers(node);
            let said: Vec<Said> =
                peers.iter().map(|peer| self.seen[&(node, *peer)].clone()).filter(|it| !it.keys.is_empty()).collect();
            let keys = wanted(&self.own[node], &said, self.heard[node]);
            assert!(
                keys.len() <= 2 && keys.iter().map(|it| it % 2).collect::<BTreeSet<_>>().len() == keys.len(),
                "{keys:?}"
            );
            self.own[node].keys = keys.clone();
            self.configured.retain(|(of, _, _)| *of != node);
            let mut oldest = keys.last().copied().unwrap();
            for peer in peers {
                let common: BTreeSet<u32> = keys.intersection(&self.seen[&(node, peer)].keys).copied().collect();
                self.configured.extend(common.iter().map(|it| (node, peer, *it)));
                self.connected.retain(|(of, with, it)| (*of, *with) != (node, peer) || common.contains(it));
                // As portolan_net does it.
                let works = common.iter().rev().find(|it| self.connected.contains(&(node, peer, **it)));
                match works.or(common.last()) {
                    Some(chosen) => self.sends.insert((node, peer), *chosen),
                    None => self.sends.remove(&(node, peer)),
                };
                oldest = works.or(common.first()).copied().unwrap_or(oldest).min(oldest);
            }
            self.own[node].sends = oldest;
        }

        fn shake_hands(&mut self) {
            let both = |(a, b, it): &(usize, usize, u32)| self.configured.contains(&(*b, *a, *it));
            let new: Vec<_> = self.configured.iter().filter(|it| both(it)).copied().collect();
            self.connected.extend(new);
        }

        /// Whether what `a` sends to `b` is taken there.
        fn arrives(&self, a: usize, b: usize) -> bool {
            self.sends.get(&(a, b)).is_some_and(|it| self.configured.contains(&(b, a, *it)))
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..NODES, 0..NODES).prop_map(|(of, peer)| Step::Look(of, peer)),
            3 => (0..NODES).prop_map(Step::Hear),
            4 => (0..NODES).prop_map(Step::Act),
            2 => Just(Step::Rotate),
            4 => (0..NODES).prop_map(Step::Write),
        ]
    }

    fn edges() -> impl Strategy<Value = BTreeSet<(usize, usize)>> {
        let all: Vec<_> = (0..NODES).flat_map(|a| (a + 1..NODES).map(move |b| (a, b))).collect();
        proptest::sample::subsequence(all, 1..=NODES * (NODES - 1) / 2).prop_map(|some| some.into_iter().collect())
    }

    /// Everybody hears of everything and acts, so many times.
    fn settle(model: &mut Model, rounds: usize) {
        for _ in 0..rounds {
            for node in 0..NODES {
                (0..NODES).for_each(|peer| model.step(Step::Look(node, peer)));
                model.step(Step::Hear(node));
                model.step(Step::Act(node));
                model.step(Step::Write(node));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// News are late, and in any order: what has once arrived goes on arriving.
        #[test]
        fn no_packet_is_lost(edges in edges(), steps in proptest::collection::vec(step(), 1..200)) {
            let mut model = Model::new(&edges);
            let mut worked = BTreeSet::new();
            for step in steps {
                model.step(step);
                for (a, b) in model.seen.keys() {
                    if model.arrives(*a, *b) && model.arrives(*b, *a) {
                        worked.insert((*a, *b));
                    }
                    prop_assert!(!worked.contains(&(*a, *b)) || model.arrives(*a, *b), "from {a} to {b} after {step:?}");
                }
            }
        }

        /// Whatever happened, reboots among it: in the end all have one key of the same generation wherever they talk, and do.
        #[test]
        fn it_comes_to_an_end(
            edges in edges(),
            steps in proptest::collection::vec(prop_oneof![9 => step(), 1 => (0..NODES).prop_map(Step::Reboot)], 1..200),
        ) {
            let mut model = Model::new(&edges);
            steps.into_iter().for_each(|step| model.step(step));
            settle(&mut model, 6);
            for (a, b) in model.seen.keys() {
                prop_assert_eq!(model.own[*a].keys.len(), 1);
                prop_assert_eq!(&model.own[*a], &model.own[*b]);
                prop_assert!(model.arrives(*a, *b));
            }
        }
    }
}
