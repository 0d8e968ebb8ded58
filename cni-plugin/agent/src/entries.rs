//! Makes the kernel's forwarding entries follow what the nodes say, in parts: who plugs a pod in or out waits for one part at most.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use kube::{Resource, runtime::reflector::ObjectRef};
use portolan_net::{Change, Forwarding, Here, Known};

use crate::{agent::Agent, journal::Gone};

/// How many entries are changed before others get their turn: some milliseconds.
const PART: usize = 2048;
/// How often the kernel is asked what it really has.
const INTERVAL: Duration = Duration::from_secs(60);
/// How many times as long as it took to ask passes at least until the next time.
const SELDOM: u32 = 100;

/// The entries that each network has, by VNI.
#[derive(Default)]
pub(crate) struct Entries(BTreeMap<u32, OfNetwork>);

struct OfNetwork {
    /// Which of the networks of that VNI has them.
    which: u64,
    known: Known,
    /// When the kernel was asked, and how long that took.
    asked: (Instant, Duration),
    /// What they are, if all of it is so.
    done: Option<Forwarding>,
    /// What the network's Events were told last of entries that are refused.
    told: Option<String>,
}

/// Not all entries are there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EntriesError {
    /// The kernel says so.
    #[error(transparent)]
    Net(#[from] portolan_net::Error),
    /// It will be done for what the network is then.
    #[error("the network was made anew meanwhile")]
    Remade,
}

impl EntriesError {
    /// Whether all that can be done is done: the kernel has no room for the rest.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Net(portolan_net::Error::Entry { .. }))
    }
}

impl Entries {
    /// These endpoints are plugged out, and what there was of them in the kernel is gone.
    pub fn forget(&mut self, gone: BTreeSet<Gone>) {
        for (vni, address, mac) in gone {
            if let Some(entries) = self.0.get_mut(&vni) {
                entries.known.forget(address, mac);
                entries.done = None;
            }
        }
    }

    /// A network is gone.
    pub fn remove(&mut self, vni: u32) {
        self.0.remove(&vni);
    }

    /// What is known of a network's entries; nothing if it is another network by now, or if it is time to ask the kernel.
    fn take(&mut self, vni: u32, which: u64) -> Option<OfNetwork> {
        let entries = self.0.remove(&vni)?;
        let (at, took) = entries.asked;
        (entries.which == which && at.elapsed() < INTERVAL.max(took * SELDOM)).then_some(entries)
    }
}

impl Agent {
    /// Makes a network's entries what is wanted. What it was given up at is known, and is gone on from.
    pub(crate) async fn forward(
        &self,
        entries: &mut Entries,
        (name, vni): (&str, u32),
        wanted: Forwarding,
    ) -> Result<(), EntriesError> {
        let which = self.applied.read().await.which(vni);
        let begun = Instant::now();
        let before = entries.take(vni, which);
        let (known, asked, before, done) = match before {
            Some(before) if before.done.as_ref() == Some(&wanted) => {
                entries.0.insert(vni, before);
                return Ok(());
            }
            Some(before) => (before.known, Some(before.asked), before.told, before.done),
            None => Default::default(),
        };
        let mut forwarder = self.dataplane.forwarder(vni, known).await?;
        let asked = asked.unwrap_or_else(|| (begun, begun.elapsed()));
        let changes = match &done {
            Some(done) => forwarder.changes_since(done, &wanted),
            None => forwarder.changes(&wanted),
        };
        let (mut changes, mut made, mut left) = (changes, 0, 0);
        while !changes.is_empty() {
            left = 0;
            for part in changes.chunks(PART) {
                let right = self.applied.write().await;
                if right.which(vni) != which {
                    return Err(EntriesError::Remade);
                }
                // Who was plugged in since then is told of again, with the next pass.
                let here: Here = self.journal.select(|e| e.vni == vni).iter().flat_map(|e| e.identities()).collect();
                let some: Vec<Change> = part.iter().filter(|change| !change.is_against(&here)).copied().collect();
                made += some.len();
                left += part.len() - some.len();
                forwarder.apply(some).await?;
            }
            changes = forwarder.again(&wanted);
        }
        let (known, result) = forwarder.finish();
        if made + left > 0 {
            let took = begun.elapsed();
            tracing::debug!(network = name, changes = made, left, ?took, "forwarding");
        }
        let done = (result.is_ok() && left == 0).then_some(wanted);
        let told = result.as_ref().err().map(|error| format!("node {}: {error}", self.cluster.node));
        if let Some(message) = told.as_ref().filter(|message| before.as_ref() != Some(*message))
            && let Some(object) = self.cluster.networks.get(&ObjectRef::new(name))
        {
            self.events.warning_in_passing(&object.object_ref(&()), "NotForwarded", "Forward", message);
        }
        entries.0.insert(vni, OfNetwork { which, known, asked, done, told });
        result.map_err(Into::into)
    }
}
