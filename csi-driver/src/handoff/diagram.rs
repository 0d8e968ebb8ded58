//! The diagram in docs/handoff.md: found by trying every event in every phase, so that it can't say what the code doesn't.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use portolan_crds::{AskedBy, Handoff, HandoffPhase, PortableVolume, PortableVolumeStatus};

use super::{Ask, Event, Known, transition};

const EPOCH: i64 = 2;
const GUID: &str = "7";

/// A volume of node a in a phase of its move to b.
fn volume(phase: Option<HandoffPhase>) -> PortableVolume {
    let mut volume = PortableVolume::new("pvc-1", Default::default());
    let owner = if phase == Some(HandoffPhase::Activating) { "b" } else { "a" };
    let (from, to) = ("a".to_owned(), "b".to_owned());
    let (snapshot, guid) = (Some("portolan-2".to_owned()), Some(GUID.to_owned()));
    let handoff =
        phase.map(|phase| Handoff { from, to, epoch: EPOCH, phase, snapshot, guid, warm: true, ..Handoff::default() });
    volume.status =
        Some(PortableVolumeStatus { owner: Some(owner.into()), epoch: 1, handoff, ..PortableVolumeStatus::default() });
    volume
}

fn events() -> Vec<(&'static str, Event)> {
    let at = || MicroTime(jiff::Timestamp::UNIX_EPOCH);
    let ask = |warm| Ask { to: "b".into(), by: AskedBy::Migration, warm, ..Ask::default() };
    let (a, b) = (|| "a".to_owned(), || "b".to_owned());
    let snapshot = || Known { name: "portolan-2".into(), guid: GUID.into() };
    vec![
        ("asked, warm", Event::Asked(ask(true), at())),
        ("asked", Event::Asked(ask(false), at())),
        ("aborted", Event::Aborted { why: String::new(), at: at() }),
        ("refresh", Event::Refresh),
        ("round taken", Event::RoundTaken { node: a(), epoch: EPOCH, snapshot: snapshot(), at: at() }),
        ("round received", Event::RoundReceived { node: b(), epoch: EPOCH, guid: GUID.into(), round: None }),
        ("published", Event::Published { node: a(), epoch: EPOCH, snapshot: snapshot(), quiesced_at: at() }),
        ("took over", Event::TookOver { node: b(), epoch: EPOCH, guid: GUID.into(), bytes: 0, base: None }),
        ("finished", Event::Finished { node: b(), epoch: EPOCH, at: at() }),
    ]
}

fn name(volume: &PortableVolumeStatus) -> String {
    let phase = volume.handoff.as_ref().map(|handoff| format!("{:?}", handoff.phase));
    phase.unwrap_or_else(|| format!("Ready_{}", volume.owner.as_deref().unwrap_or_default()))
}

fn diagram() -> String {
    let phases = [None].into_iter().chain(
        [HandoffPhase::PreCopy, HandoffPhase::Quiescing, HandoffPhase::FinalSync, HandoffPhase::Activating].map(Some),
    );
    let mut edges = BTreeSet::new();
    for phase in phases {
        let before = volume(phase);
        let from = before.status.as_ref().map(name).unwrap_or_default();
        for (what, event) in events() {
            match transition(&before, event) {
                // Asked for again, or aborted when there is nothing: no news.
                Ok(after) if Some(&after) == before.status.as_ref() => {}
                Ok(after) => _ = edges.insert(format!("    {from} --> {}: {what}", name(&after))),
                Err(_) => {}
            }
        }
    }
    let lines: Vec<String> = edges.into_iter().collect();
    format!("```mermaid\nstateDiagram-v2\n    [*] --> Ready_a\n{}\n```", lines.join("\n"))
}

#[test]
fn the_diagram_in_the_docs_is_the_code_s() {
    let docs = include_str!("../../../docs/handoff.md");
    let diagram = diagram();
    assert!(docs.contains(&diagram), "docs/handoff.md should have this diagram:\n{diagram}");
}
