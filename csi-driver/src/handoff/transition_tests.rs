use portolan_crds::{AskedBy, HandoffOutcome, HandoffPhase, PortableVolume, VolumePhase};

use super::*;

fn at(millisecond: i64) -> k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime {
    k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(jiff::Timestamp::from_millisecond(millisecond).unwrap())
}

fn known(name: &str) -> Known {
    Known { name: name.into(), guid: format!("g-{name}") }
}

/// A volume, and what happens to it.
struct History(PortableVolume);

impl History {
    fn owned() -> Self {
        let mut history = Self(PortableVolume::new("pvc-1", Default::default()));
        history.happens(Event::Recorded { node: "a".into(), snapshot: None });
        history.happens(Event::Owned { node: "a".into(), spec: Box::default() });
        history
    }

    fn happens(&mut self, event: Event) {
        self.0.status = Some(transition(&self.0, event).unwrap());
    }

    fn refuses(&self, event: Event) -> String {
        transition(&self.0, event).unwrap_err().to_string()
    }

    fn status(&self) -> &portolan_crds::PortableVolumeStatus {
        self.0.status.as_ref().unwrap()
    }

    fn phase(&self) -> Option<HandoffPhase> {
        self.status().handoff.as_ref().map(|handoff| handoff.phase)
    }

    fn owner(&self) -> (&str, i64, VolumePhase) {
        let status = self.status();
        (status.owner.as_deref().unwrap(), status.epoch, status.phase)
    }
}

fn asked(to: &str) -> Event {
    Event::Asked(Ask { to: to.into(), ..Ask::default() }, at(0))
}

fn warm(to: &str, by: AskedBy) -> Event {
    Event::Asked(Ask { to: to.into(), by, warm: true, ..Ask::default() }, at(0))
}

fn published(epoch: i64, name: &str) -> Event {
    Event::Published { node: "a".into(), epoch, snapshot: known(name), quiesced_at: at(1000) }
}

fn took_over(node: &str, epoch: i64, name: &str) -> Event {
    Event::TookOver { node: node.into(), epoch, guid: format!("g-{name}"), bytes: 0, base: None }
}

fn round_taken(epoch: i64, name: &str) -> Event {
    Event::RoundTaken { node: "a".into(), epoch, snapshot: known(name), at: at(5) }
}

fn round_received(epoch: i64, name: &str, bytes: i64, milliseconds: i64) -> Event {
    let round = Some(Round { bytes, milliseconds });
    Event::RoundReceived { node: "b".into(), epoch, guid: format!("g-{name}"), round }
}

#[test]
fn a_handoff_from_end_to_end() {
    let mut history = History::owned();
    history.happens(asked("b"));
    assert_eq!((history.owner(), history.phase()), (("a", 1, VolumePhase::Moving), Some(HandoffPhase::Quiescing)));
    history.happens(published(2, "portolan-2"));
    assert_eq!((history.owner().0, history.phase()), ("a", Some(HandoffPhase::FinalSync)));
    history.happens(took_over("b", 2, "portolan-2"));
    assert_eq!((history.owner(), history.phase()), (("b", 2, VolumePhase::Moving), Some(HandoffPhase::Activating)));
    history.happens(Event::Finished { node: "b".into(), epoch: 2, at: at(1250) });
    assert_eq!((history.owner(), history.phase()), (("b", 2, VolumePhase::Ready), None));
    let report = history.status().last_handoff.clone().unwrap();
    assert_eq!((report.outcome, report.downtime_milliseconds, report.epoch), (HandoffOutcome::Done, 250, 2));
    assert!(history.status().replicas.iter().all(|replica| replica.guid.as_deref() == Some("g-portolan-2")));
}

#[test]
fn a_target_whose_clock_is_behind_tells_of_no_downtime_rather_than_of_a_negative_one() {
    let mut history = History::owned();
    history.happens(asked("b"));
    history.happens(published(2, "portolan-2"));
    history.happens(took_over("b", 2, "portolan-2"));
    history.happens(Event::Finished { node: "b".into(), epoch: 2, at: at(-3_600_000) });
    assert_eq!(history.status().last_handoff.clone().unwrap().downtime_milliseconds, 0);
}

#[test]
fn only_whose_turn_it_is_with_what_was_published() {
    let mut history = History::owned();
    assert!(history.refuses(published(2, "portolan-2")).contains("no handoff"));
    history.happens(asked("b"));
    assert!(history.refuses(asked("a")).contains("on node a already"));
    assert!(history.refuses(took_over("b", 2, "portolan-2")).contains("Quiescing"));
    assert!(history.refuses(published(1, "portolan-2")).contains("that of epoch 2"));
    history.happens(published(2, "portolan-2"));
    assert!(history.refuses(published(2, "portolan-2-2")).contains("FinalSync"));
    for (node, epoch, name) in [("c", 2, "portolan-2"), ("b", 1, "portolan-2"), ("b", 2, "portolan-2-2")] {
        history.refuses(took_over(node, epoch, name));
    }
    history.happens(took_over("b", 2, "portolan-2"));
    history.refuses(took_over("b", 2, "portolan-2"));
    history.refuses(Event::Finished { node: "a".into(), epoch: 2, at: at(0) });
    assert!(history.refuses(Event::Aborted { why: "late".into(), at: at(0) }).contains("owns the volume already"));
    assert!(history.refuses(asked("c")).contains("is taking it over"));
    assert!(history.refuses(Event::Forgotten { node: "b".into() }).contains("owns"));
    assert!(history.refuses(Event::Owned { node: "c".into(), spec: Box::default() }).contains("node b owns"));
}

#[test]
fn an_abort_leaves_the_source_and_its_epoch_and_uses_up_the_attempts() {
    let mut history = History::owned();
    history.happens(asked("b"));
    history.happens(published(2, "portolan-2"));
    history.happens(Event::Aborted { why: "the pod is gone".into(), at: at(0) });
    // Ready is what the source says, once it is writable again.
    assert_eq!((history.owner(), history.phase()), (("a", 1, VolumePhase::Moving), None));
    let report = history.status().last_handoff.clone().unwrap();
    assert_eq!((report.outcome, report.reason.as_deref()), (HandoffOutcome::Aborted, Some("the pod is gone")));
    history.refuses(took_over("b", 2, "portolan-2"));
    history.happens(asked("b"));
    assert_eq!(history.status().handoff.as_ref().unwrap().epoch, 3);
    history.refuses(published(2, "portolan-2"));
    // The pod starts on a third node.
    history.happens(asked("c"));
    let handoff = history.status().handoff.clone().unwrap();
    assert_eq!((handoff.to.as_str(), handoff.epoch, handoff.phase), ("c", 4, HandoffPhase::Quiescing));
}

#[test]
fn what_an_aborted_move_may_have_brought_matters_until_its_target_has_said() {
    let mut history = History::owned();
    history.happens(asked("b"));
    history.happens(published(2, "portolan-2"));
    history.happens(Event::Aborted { why: "not wanted".into(), at: at(0) });
    let waited_for = |history: &History| history.status().last_handoff.clone().unwrap().guid.is_some();
    history.happens(Event::Recorded { node: "b".into(), snapshot: None });
    history.happens(Event::Recorded { node: "a".into(), snapshot: Some(known("portolan-2")) });
    assert!(waited_for(&history), "b has not said what it has");
    let mut gone = History(history.0.clone());
    gone.happens(Event::Forgotten { node: "b".into() });
    assert!(!waited_for(&gone));
    history.happens(Event::Recorded { node: "b".into(), snapshot: Some(known("daily")) });
    assert!(!waited_for(&history));
}

#[test]
fn rounds_until_what_is_left_is_small_or_stays_as_large() {
    let mut history = History::owned();
    history.happens(warm("b", AskedBy::Migration));
    assert_eq!((history.owner(), history.phase()), (("a", 1, VolumePhase::Ready), Some(HandoffPhase::PreCopy)));
    let is_warm = |history: &History| history.status().handoff.as_ref().unwrap().warm;
    for (name, bytes, milliseconds, expected) in [
        ("portolan-2", 10 << 30, 100_000, false),
        ("portolan-2-2", 1 << 30, 10_000, false),
        ("portolan-2-3", 10 << 20, 100, true),
    ] {
        history.happens(round_taken(2, name));
        history.refuses(round_received(2, "portolan-1", 0, 0));
        history.happens(round_received(2, name, bytes, milliseconds));
        assert_eq!(is_warm(&history), expected, "{name}");
        assert!(history.status().replicas.iter().all(|it| it.snapshot.as_deref() == Some(name)));
    }
    history.happens(Event::Refresh);
    assert!(!is_warm(&history));
    // It doesn't get smaller.
    history.happens(round_taken(2, "portolan-2-4"));
    history.happens(round_received(2, "portolan-2-4", 10 << 20, 9_000));
    assert!(is_warm(&history));
    let handoff = history.status().handoff.clone().unwrap();
    assert_eq!((handoff.rounds, handoff.pre_copy_bytes), (4, (11 << 30) + (20 << 20)));
    // The pod is there: what was the newest round's is no final snapshot.
    history.happens(asked("b"));
    let handoff = history.status().handoff.clone().unwrap();
    assert_eq!((handoff.phase, handoff.guid, handoff.epoch), (HandoffPhase::Quiescing, None, 2));
    assert_eq!(history.owner().2, VolumePhase::Moving);
    history.refuses(round_received(2, "portolan-2-4", 1, 1));
    history.refuses(took_over("b", 2, "portolan-2-4"));
}

#[test]
fn rounds_end_even_if_their_figures_are_lost() {
    let mut history = History::owned();
    history.happens(warm("b", AskedBy::Cordon));
    let mut rounds = 0;
    while !history.status().handoff.as_ref().unwrap().warm {
        rounds += 1;
        let name = format!("portolan-2-{rounds}");
        history.happens(round_taken(2, &name));
        let guid = format!("g-{name}");
        history.happens(Event::RoundReceived { node: "b".into(), epoch: 2, guid, round: None });
        assert!(rounds < 100);
    }
}

#[test]
fn a_pod_s_place_outweighs_a_wish_and_a_wish_a_guess() {
    let mut history = History::owned();
    history.happens(warm("b", AskedBy::Cordon));
    history.happens(warm("c", AskedBy::Migration));
    assert_eq!(history.status().handoff.as_ref().unwrap().to, "c");
    assert!(history.refuses(warm("b", AskedBy::Cordon)).contains("moving to node c already"));
    history.happens(asked("b"));
    let handoff = history.status().handoff.clone().unwrap();
    assert_eq!((handoff.to.as_str(), handoff.phase, handoff.epoch), ("b", HandoffPhase::Quiescing, 4));
}

#[test]
fn an_owner_s_copy_is_never_put_out_of_the_way() {
    let mut history = History::owned();
    let quarantined = |node: &str| Event::Quarantined { node: node.into(), message: "m".into() };
    assert!(history.refuses(quarantined("a")).contains("owns"));
    history.happens(Event::Recorded { node: "b".into(), snapshot: Some(known("portolan-2")) });
    history.happens(quarantined("b"));
    assert_eq!(history.status().replicas[1].guid, None);
    assert_eq!(history.status().replicas[1].node, "b");
}
