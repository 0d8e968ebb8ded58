//! Who transfers next, where only so many may at a time. Pure: nothing waits and no clock is read here.
//!
//! The more urgent class goes first, and within a class who came first. So that urgency doesn't starve anybody, one that has been passed by
//! [`PATIENCE`] who came later counts as most urgent. So that what is urgent never waits for something long to end, one place of
//! several is kept for finals.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a transfer is for, the most urgent first.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The last of a move: its pod is down until it is there.
    Final,
    /// A new volume's data, or a copy for a node that reads: the first pod there may wait for them.
    Restore,
    /// Nobody waits for it: its pod runs on.
    #[default]
    Background,
}

/// How many who came later may go before one.
const PATIENCE: u32 = 8;

/// Those who transfer and those who wait. A transfer is known by a number that no other has had.
#[derive(Debug)]
pub(super) struct Queue {
    limit: usize,
    running: BTreeMap<u64, Class>,
    /// In the order of their coming.
    waiting: Vec<Waiter>,
    next: u64,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    class: Class,
    /// How many who came later have gone before it.
    passed: u32,
}

impl Waiter {
    /// The smallest goes first.
    fn rank(&self) -> (Class, u64) {
        (if self.passed >= PATIENCE { Class::Final } else { self.class }, self.id)
    }
}

impl Queue {
    /// For so many at a time; at least one.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), running: BTreeMap::new(), waiting: Vec::new(), next: 0 }
    }

    /// One more comes.
    pub(super) fn enter(&mut self, class: Class) -> u64 {
        let id = self.next;
        self.next += 1;
        self.waiting.push(Waiter { id, class, passed: 0 });
        self.admit();
        id
    }

    /// One has ended, or waits no longer. Another who has left already is no error.
    pub(super) fn leave(&mut self, id: u64) {
        self.running.remove(&id);
        self.waiting.retain(|waiter| waiter.id != id);
        self.admit();
    }

    /// How many go before one that waits; none if it needn't wait.
    pub(super) fn before(&self, id: u64) -> Option<usize> {
        let rank = self.waiting.iter().find(|waiter| waiter.id == id)?.rank();
        Some(self.waiting.iter().filter(|waiter| waiter.rank() < rank).count())
    }

    /// Gives the free places away.
    fn admit(&mut self) {
        while let Some(first) = self.first() {
            let (id, class) = (self.waiting[first].id, self.waiting[first].class);
            for index in 0..first {
                if self.is_free_for(self.waiting[index].class) {
                    self.waiting[index].passed += 1;
                }
            }
            self.waiting.remove(first);
            self.running.insert(id, class);
        }
    }

    /// Where in the queue the next is for whom a place is free.
    fn first(&self) -> Option<usize> {
        let free = self.waiting.iter().enumerate().filter(|(_, waiter)| self.is_free_for(waiter.class));
        free.min_by_key(|(_, waiter)| waiter.rank()).map(|(index, _)| index)
    }

    fn is_free_for(&self, class: Class) -> bool {
        let others = self.running.values().filter(|class| **class != Class::Final).count();
        self.running.len() < self.limit && (class == Class::Final || self.limit == 1 || others < self.limit - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::Class::{Background, Final, Restore};
    use super::*;

    #[test]
    fn a_final_goes_before_all_others_and_among_equals_who_came_first() {
        let mut queue = Queue::new(1);
        let runs = queue.enter(Background);
        let [one, two, new, last] = [Background, Background, Restore, Final].map(|class| queue.enter(class));
        assert_eq!([runs, last, new, one, two].map(|id| queue.before(id)), [None, Some(0), Some(1), Some(2), Some(3)]);
        let mut order = vec![runs];
        while let Some(now) = order.last().copied().filter(|_| order.len() < 5) {
            queue.leave(now);
            order.extend(queue.running.keys());
        }
        assert_eq!(order, [runs, last, new, one, two]);
    }

    #[test]
    fn a_place_is_kept_for_finals() {
        let mut queue = Queue::new(3);
        let ids = [Background, Restore, Background, Final, Final].map(|class| queue.enter(class));
        assert_eq!(ids.map(|id| queue.before(id)), [None, None, Some(1), None, Some(0)]);
        queue.leave(ids[3]);
        assert_eq!(ids.map(|id| queue.before(id)), [None, None, Some(0), None, None]);
        queue.leave(ids[4]);
        assert_eq!(queue.before(ids[2]), Some(0), "the last place is not for it");
        queue.leave(ids[0]);
        assert_eq!(queue.before(ids[2]), None);
    }

    #[test]
    fn one_who_waits_can_go_away() {
        let mut queue = Queue::new(1);
        let [runs, gone, next] = [Final, Final, Final].map(|class| queue.enter(class));
        queue.leave(gone);
        queue.leave(gone);
        assert_eq!((queue.before(gone), queue.before(next)), (None, Some(0)));
        queue.leave(runs);
        assert_eq!(queue.running.keys().copied().collect::<Vec<_>>(), [next]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Enter(Class),
        /// One of those who run ends, or of those who wait goes away.
        Leave(bool, prop::sample::Index),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let class = prop_oneof![4 => Just(Final), 1 => Just(Restore), 2 => Just(Background)];
        let leave =
            (prop::bool::weighted(0.8), any::<prop::sample::Index>()).prop_map(|(runs, who)| Step::Leave(runs, who));
        prop::collection::vec(prop_oneof![class.prop_map(Step::Enter), leave], 1..400)
    }

    /// What is known of one who waits.
    struct Known {
        class: Class,
        /// How many were there when it came.
        earlier: usize,
        /// How many since then have got a place that it could have had.
        missed: usize,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn limits_order_and_patience_hold(limit in 1usize..6, steps in steps()) {
            let mut queue = Queue::new(limit);
            let mut known: BTreeMap<u64, Known> = BTreeMap::new();
            for step in steps {
                let ran = queue.running.clone();
                let waited: Vec<u64> = queue.waiting.iter().map(|waiter| waiter.id).collect();
                let shared = |queue: &Queue| queue.running.values().filter(|class| **class != Final).count();
                let mut left = None;
                match step {
                    Step::Enter(class) => {
                        let earlier = queue.waiting.len();
                        let id = queue.enter(class);
                        known.insert(id, Known { class, earlier, missed: 0 });
                    }
                    Step::Leave(runs, who) => {
                        let of: Vec<u64> = if runs { ran.keys().copied().collect() } else { waited.clone() };
                        if of.is_empty() {
                            continue;
                        }
                        left = Some(*who.get(&of));
                        queue.leave(*who.get(&of));
                    }
                }
                // Never too many, and the last of several is for finals only.
                prop_assert!(queue.running.len() <= limit);
                prop_assert!(limit == 1 || shared(&queue) < limit);
                // Nobody waits for whom there is a place.
                prop_assert!(queue.waiting.iter().all(|waiter| !queue.is_free_for(waiter.class)));
                // Everybody is where it was, but for who has left and who was admitted.
                prop_assert!(ran.keys().all(|id| queue.running.contains_key(id) || left == Some(*id)));
                let is_somewhere = |id: &u64| queue.before(*id).is_some() || queue.running.contains_key(id);
                prop_assert!(waited.iter().all(|id| is_somewhere(id) || left == Some(*id)));
                // At most one was admitted: to whom else was its place open?
                let others = ran.iter().filter(|(id, class)| left != Some(**id) && **class != Final).count();
                for id in queue.running.keys().copied().filter(|id| !ran.contains_key(id)) {
                    let Known { class, earlier, missed } = known.remove(&id).unwrap();
                    prop_assert!(missed <= earlier + PATIENCE as usize, "{missed} were preferred to {id}");
                    let equals = queue.waiting.iter().filter(|waiter| waiter.class == class && waiter.id < id).count();
                    prop_assert_eq!(equals, 0, "an equal came first");
                    for waiter in &queue.waiting {
                        if waiter.class == Final || limit == 1 || others < limit - 1 {
                            known.get_mut(&waiter.id).unwrap().missed += 1;
                        }
                    }
                }
            }
            // In the end all who are left come to their turn.
            let mut rest = queue.waiting.len();
            while let Some(id) = queue.running.keys().next().copied() {
                queue.leave(id);
                prop_assert!(queue.waiting.len() <= rest);
                rest = queue.waiting.len();
            }
            prop_assert_eq!(rest, 0);
        }
    }
}
