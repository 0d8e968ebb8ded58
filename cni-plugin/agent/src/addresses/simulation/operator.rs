//! The operator's collection of what nobody owns any more, step by step: its order, with its own verdicts.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Instant,
};

use kube::ResourceExt;
use portolan_operator::garbage::{Gone, QUARANTINE, has_place, mentions};

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
    let of_blocks = blocks.iter().map(|it| (&it.spec.node, it.resource_version()));
    gone.lock().unwrap().look(of_blocks.chain(claims.values().flat_map(|it| mentions(it))), &present, now);
    for block in blocks.iter().filter(|block| gone.lock().unwrap().since(&block.spec.node, now, quarantine)) {
        pause().await;
        lock().delete_block(block, true);
    }

    for claim in claims.values() {
        let left = gone.lock().unwrap().without_ended(claim, &present, now);
        if let Some(left) = left {
            pause().await;
            lock().replace_claim(&left);
        }
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
        let has_ended = |node: &String| {
            let is_there = lock().nodes.contains(node);
            gone.lock().unwrap().has_ended(node, is_there, now)
        };
        let have_ended = claim.spec.nodes().all(has_ended);
        if !have_ended && !matches!(without, Without::NodesEnd | Without::PodsEnd) {
            continue;
        }
        pause().await;
        let set = lock().sets.get(&claim.spec.owner).cloned();
        // Now and then it takes long until it acts, in which a StatefulSet may be made anew and its pod started.
        let long = lock().random.below(60);
        for _ in 0..long {
            pause().await;
        }
        if !has_place(claim, set.as_ref()) {
            lock().delete_claim(claim);
        }
    }
}
