//! The operator's collection of what nobody owns any more, step by step: its order, with its own verdicts.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Instant,
};

use portolan_operator::garbage::{Gone, QUARANTINE, has_place};

use super::server::{Server, Without, pause};

/// One round at `now`. What it was told of before may have changed when it acts.
pub async fn collect(server: Arc<Mutex<Server>>, gone: Arc<Mutex<Gone>>, now: Instant) {
    let lock = || server.lock().unwrap();
    let without = lock().without;
    let quarantine = if without == Without::Quarantine { Default::default() } else { QUARANTINE };
    let blocks: Vec<_> = lock().blocks.values().cloned().collect();
    pause().await;
    let claims = lock().claims();
    pause().await;
    let present: BTreeSet<String> = lock().nodes.clone();
    let mentioned = blocks.iter().map(|it| &it.spec.node).chain(claims.values().filter_map(|it| it.spec.node.as_ref()));
    let missing = mentioned.filter(|node| !present.contains(*node)).cloned().collect();
    gone.lock().unwrap().look(missing, now);
    for block in blocks.iter().filter(|block| gone.lock().unwrap().since(&block.spec.node, now, quarantine)) {
        pause().await;
        lock().delete_block(block, true);
    }

    let claims = lock().claims();
    pause().await;
    let sets = lock().sets.clone();
    for claim in claims.values().filter(|claim| !has_place(claim, sets.get(&claim.spec.owner))) {
        pause().await;
        if lock().pods.contains(&claim.spec.pod) && without != Without::PodsEnd {
            continue;
        }
        pause().await;
        let node = claim.spec.node.clone().unwrap_or_default();
        let is_there = lock().nodes.contains(&node);
        let has_ended = gone.lock().unwrap().has_ended(&node, is_there, now);
        if !has_ended && !matches!(without, Without::NodesEnd | Without::PodsEnd) {
            continue;
        }
        pause().await;
        let set = lock().sets.get(&claim.spec.owner).cloned();
        pause().await;
        if !has_place(claim, set.as_ref()) {
            lock().delete_claim(claim);
        }
    }
}
