//! The round after a pod's end, which may have been the last.

use super::*;

fn resting(snapshots: &[&str], at: Option<&str>) -> Local {
    Local { rests_at: at.map(|name| format!("g-{name}")), ..copy(3, snapshots) }
}

#[test]
fn a_source_takes_one_more_round_when_the_pod_has_ended() {
    let warm = copying(Some("portolan-4"), Some("portolan-4"), true);
    let take = |local: &Local| plan("a", &warm, Some(local), &[]);
    let round = Action::PublishRound { name: "portolan-4-2".into(), rests: true };
    let one_more = [Action::SetReadonly(true), round];
    assert_eq!(take(&resting(&["portolan-4"], None)), one_more);
    assert_eq!(take(&resting(&["portolan-4"], Some("portolan-4"))), [], "it was that round");
    assert_eq!(take(&Local { mounted: true, ..resting(&["portolan-4"], None) }), []);
    assert_eq!(take(&Local { open: true, ..resting(&["portolan-4"], None) }), [], "its log may have more");
    assert_eq!(take(&resting(&["portolan-4"], Some("portolan-3"))), one_more, "of an earlier time");
    let readonly = Local { readonly: true, ..resting(&["portolan-4"], Some("portolan-4")) };
    assert_eq!(take(&readonly), [], "it stays so");
    assert_eq!(take(&Local { mounted: true, open: true, ..readonly })[..1], [Action::Replay]);
    let mut zvol = warm.clone();
    zvol.spec.mode = VolumeMode::Block;
    assert_eq!(plan("a", &zvol, Some(&resting(&["portolan-4"], None)), &[]), []);
}

#[test]
fn it_is_the_last_if_nothing_has_been_written_since() {
    let mut volume = moving(HandoffPhase::Quiescing);
    let publish = |volume: &PortableVolume, local: &Local| {
        let found = plan("a", volume, Some(local), &[]).pop();
        let Some(Action::PublishFinal { resting, .. }) = found else { panic!("{found:?}") };
        resting.map(|known| known.name)
    };
    let local = resting(&["portolan-4"], Some("portolan-4"));
    assert_eq!(publish(&volume, &local), None, "no round of this handoff");
    volume.status.as_mut().unwrap().handoff.as_mut().unwrap().round_guid = Some("g-portolan-4".into());
    assert_eq!(publish(&volume, &local).as_deref(), Some("portolan-4"));
    assert_eq!(publish(&volume, &Local { open: true, ..local.clone() }), None);
    assert_eq!(publish(&volume, &resting(&["portolan-4"], None)), None);
    assert_eq!(publish(&volume, &resting(&["portolan-4", "daily"], Some("portolan-4"))), None, "a person's is newer");
}
