use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use portolan_crds::{
    Cipher, Handoff, HandoffOutcome, HandoffPhase, HandoffReport, Placement, PortableVolumeSpec, PortableVolumeStatus,
    Replica, VolumeEncryption, VolumeMode, VolumeParameters, VolumePhase, VolumeSource,
};

use super::*;

mod last_round;

const UID: &str = "uid-1";

fn volume(change: impl FnOnce(&mut PortableVolumeStatus)) -> PortableVolume {
    let spec = PortableVolumeSpec { placement: Placement { node: "a".into() }, ..PortableVolumeSpec::default() };
    let mut volume = PortableVolume::new("pvc-1", spec);
    volume.metadata.uid = Some(UID.into());
    let mut status = PortableVolumeStatus::default();
    change(&mut status);
    volume.status = Some(status);
    volume
}

fn owned(change: impl FnOnce(&mut PortableVolumeStatus)) -> PortableVolume {
    volume(|status| {
        status.owner = Some("a".into());
        status.epoch = 3;
        status.phase = VolumePhase::Ready;
        status.used_bytes = Some(0);
        status.size_bytes = Some(0);
        status.parameters = Some(VolumeParameters::default());
        status.replicas = vec![replica("a", Some("portolan-3"))];
        status.conditions = vec![Condition {
            last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
            message: String::new(),
            observed_generation: None,
            reason: "Ready".into(),
            status: "True".into(),
            type_: "Ready".into(),
        }];
        change(status);
    })
}

/// The volume of a, moving to b at epoch 4.
fn moving(phase: HandoffPhase) -> PortableVolume {
    owned(|status| {
        let known = phase > HandoffPhase::Quiescing;
        status.phase = VolumePhase::Moving;
        status.handoff = Some(Handoff {
            from: "a".into(),
            to: "b".into(),
            epoch: 4,
            phase,
            snapshot: known.then(|| "portolan-4".into()),
            guid: known.then(|| "g-portolan-4".into()),
            ..Handoff::default()
        });
        status.replicas = vec![replica("a", known.then_some("portolan-4")), replica("b", None)];
        if phase == HandoffPhase::Activating {
            status.owner = Some("b".into());
            status.epoch = 4;
        }
    })
}

fn replica(node: &str, snapshot: Option<&str>) -> Replica {
    Replica { node: node.into(), snapshot: snapshot.map(Into::into), guid: snapshot.map(|name| format!("g-{name}")) }
}

fn known(name: &str) -> Known {
    Known { name: name.into(), guid: format!("g-{name}") }
}

fn copy(epoch: i64, snapshots: &[&str]) -> Local {
    Local {
        uid: Some(UID.into()),
        epoch: Some(epoch),
        snapshots: snapshots.iter().map(|name| known(name)).collect(),
        ..Local::default()
    }
}

fn reason(actions: &[Action]) -> Option<&'static str> {
    match actions {
        [Action::Report { reason, .. }] => Some(reason),
        _ => None,
    }
}

fn waits(actions: &[Action]) -> bool {
    matches!(actions, [Action::Wait(_)])
}

#[test]
fn a_new_volume_is_recorded_then_made_then_owned() {
    let new = volume(|_| {});
    assert_eq!(plan("a", &new, None, &[]), [Action::RecordReplica]);
    assert!(!concerns("b", &new) && plan("b", &new, None, &[]).is_empty());
    let recorded = volume(|status| status.replicas = vec![replica("a", None)]);
    assert_eq!(plan("a", &recorded, None, &[]), [Action::Create, Action::Own]);
    assert_eq!(plan("a", &recorded, Some(&copy(1, &[])), &[]), [Action::ApplySpec, Action::Own], "as the spec is now");
    // An encrypted one is made when it is mounted; what that left is owned.
    let mut sealed = recorded.clone();
    sealed.spec.encryption = Some(VolumeEncryption { cipher: Cipher::Aes256Gcm, secret: None });
    assert_eq!(plan("a", &sealed, None, &[]), [Action::AwaitKey]);
    assert_eq!(plan("a", &sealed, Some(&copy(1, &[])), &[]), [Action::ApplySpec, Action::Own]);
    // Wanted elsewhere before anybody owned it.
    let elsewhere = volume(|status| status.replicas = vec![replica("c", None)]);
    assert_eq!(plan("c", &elsewhere, None, &[]), [Action::ForgetReplica]);
    assert_eq!(plan("c", &elsewhere, Some(&copy(1, &[])), &[]), [Action::Destroy, Action::ForgetReplica]);
}

#[test]
fn a_sealed_zvol_grows_when_it_is_opened() {
    let mut grown = owned(|_| {});
    grown.spec.size_bytes = 7;
    let plans = |grown: &PortableVolume, sealed| {
        let local = Local { sealed, ..copy(3, &["portolan-3"]) };
        plan("a", grown, Some(&local), &[]).contains(&Action::ApplySpec)
    };
    assert!(plans(&grown, false) && plans(&grown, true), "a dataset's quota needs no key");
    grown.spec.mode = VolumeMode::Block;
    assert!(plans(&grown, false) && !plans(&grown, true));
}

#[test]
fn a_dataset_that_is_not_ours_is_left_alone() {
    let other = Local { uid: Some("uid-2".into()), ..copy(3, &[]) };
    let unmarked = Local { uid: None, ..copy(3, &["daily"]) };
    for local in [other, unmarked] {
        for volume in [volume(|_| {}), owned(|_| {}), moving(HandoffPhase::Quiescing), moving(HandoffPhase::FinalSync)]
        {
            assert_eq!(reason(&plan("a", &volume, Some(&local), &[])), Some("DatasetConflict"));
        }
        for volume in [moving(HandoffPhase::Quiescing), moving(HandoffPhase::FinalSync)] {
            assert_eq!(reason(&plan("b", &volume, Some(&local), &[])), Some("DatasetConflict"));
        }
        let replicated = owned(|status| status.replicas.push(replica("b", Some("portolan-3"))));
        assert_eq!(plan("b", &replicated, Some(&local), &[]), [Action::ForgetReplica]);
        assert_eq!(plan("b", &owned(|_| {}), Some(&local), &[]), []);
        let mut deleted = owned(|_| {});
        deleted.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(plan("a", &deleted, Some(&local), &[]), [Action::ForgetReplica]);
    }
}

#[test]
fn a_copy_that_has_only_begun_to_come_is_known_by_a_snapshot_that_was_asked_for() {
    let begun = Local { uid: None, epoch: None, ..copy(0, &["daily"]) };
    let moving = moving(HandoffPhase::FinalSync);
    assert_eq!(reason(&plan("b", &moving, Some(&begun), &[])), Some("DatasetConflict"), "anybody's");
    let asked = [Asked { short: "daily".into(), guid: Some("g-daily".into()), ..Asked::default() }];
    assert_eq!(plan("b", &moving, Some(&begun), &asked), [Action::RecordSnapshot(known("daily"))]);
    let mut said = moving.clone();
    said.status.as_mut().unwrap().replicas[1] = replica("b", Some("daily"));
    assert_eq!(plan("b", &said, Some(&begun), &asked), [Action::Fetch(known("portolan-4"))]);
    let another = [Asked { guid: Some("g-weekly".into()), ..asked[0].clone() }];
    assert_eq!(reason(&plan("b", &moving, Some(&begun), &another)), Some("DatasetConflict"));
}

#[test]
fn a_copy_of_an_aborted_move_says_what_it_has_though_it_is_a_persons() {
    let aborted = owned(|status| status.replicas.push(replica("b", None)));
    let local = copy(0, &["daily"]);
    assert_eq!(plan("b", &aborted, Some(&local), &[]), [Action::RecordSnapshot(known("daily"))]);
    let recorded = owned(|status| status.replicas.push(replica("b", Some("daily"))));
    assert_eq!(plan("b", &recorded, Some(&local), &[]), []);
}

#[test]
fn a_warm_target_lets_go_of_what_is_deleted() {
    let warm = copying(Some("portolan-4"), Some("portolan-4"), true);
    let deleted = [Asked { object: "o".into(), guid: Some("g-daily".into()), deleting: true, ..Asked::default() }];
    let wanted = [Action::DestroyTaken(known("daily")), Action::RecordDestroyed { object: "o".into() }];
    assert_eq!(plan("b", &warm, Some(&copy(4, &["daily", "portolan-4"])), &deleted), wanted);
    assert_eq!(plan("b", &warm, Some(&copy(3, &["portolan-4"])), &[]), [Action::Stamp(4)], "what can be done before");
}

#[test]
fn an_owner_keeps_its_copy_in_order() {
    assert_eq!(plan("a", &owned(|_| {}), Some(&copy(3, &["portolan-3"])), &[]), []);
    assert_eq!(reason(&plan("a", &owned(|_| {}), None, &[])), Some("DatasetMissing"));
    assert_eq!(reason(&plan("a", &owned(|_| {}), Some(&copy(2, &["portolan-3"])), &[])), Some("EpochMismatch"));
    let readonly = Local { readonly: true, ..copy(3, &["portolan-3"]) };
    assert_eq!(plan("a", &owned(|_| {}), Some(&readonly), &[]), [Action::SetReadonly(false)]);
    let old = copy(3, &["portolan-2", "portolan-3"]);
    assert_eq!(plan("a", &owned(|_| {}), Some(&old), &[]), [Action::DestroySnapshot(known("portolan-2"))]);
    let grown = Local { used: 1 << 20, ..copy(3, &["portolan-3"]) };
    assert_eq!(plan("a", &owned(|_| {}), Some(&grown), &[]), [Action::RecordUsed(1 << 20)]);
    let barely = Local { used: 100, ..copy(3, &["portolan-3"]) };
    assert_eq!(plan("a", &owned(|_| {}), Some(&barely), &[]), []);
}

#[test]
fn a_snapshot_has_what_a_failed_node_has_in_its_log() {
    let wanted = [Asked { object: "o".into(), short: "daily".into(), ..Asked::default() }];
    let take = || Action::Take(Box::new(wanted[0].clone()));
    let planned = |change: fn(&mut Local)| {
        let mut local = Local { open: true, ..copy(3, &["portolan-3"]) };
        change(&mut local);
        plan("a", &owned(|_| {}), Some(&local), &wanted)
    };
    let played = [Action::SetReadonly(true), Action::Replay, Action::SetReadonly(false), take()];
    assert_eq!(planned(|_| {}), played);
    assert_eq!(planned(|local| local.mounted = true), [take()], "in use: ZFS has played it");
    assert_eq!(planned(|local| (local.mounted, local.readonly) = (true, true)), played[1..], "cut short");
    assert_eq!(planned(|local| local.sealed = true), [], "its key comes with the next mount");
    let nobody_asks = Local { open: true, ..copy(3, &["portolan-3"]) };
    assert_eq!(plan("a", &owned(|_| {}), Some(&nobody_asks), &[]), []);
}

#[test]
fn a_source_proves_that_it_is_quiet_before_its_final_snapshot() {
    let volume = moving(HandoffPhase::Quiescing);
    let mounted = Local { mounted: true, ..copy(3, &["portolan-3"]) };
    assert!(waits(&plan("a", &volume, Some(&mounted), &[])));
    let last = |name: &str| Action::PublishFinal { name: name.into(), resting: None };
    let steps = |name: &str| [Action::SetReadonly(true), Action::CheckQuiet, last(name)];
    assert_eq!(plan("a", &volume, Some(&copy(3, &["portolan-3"])), &[]), steps("portolan-4"));
    // A snapshot of an attempt that was cut short is not trusted.
    assert_eq!(plan("a", &volume, Some(&copy(3, &["portolan-3", "portolan-4"])), &[]), steps("portolan-4-2"));
    // A power cut while a pod had it: what was acknowledged last is in its log.
    let cut = Local { open: true, ..copy(3, &["portolan-3"]) };
    let replayed = |readonly, mounted| {
        let actions = plan("a", &volume, Some(&Local { readonly, mounted, ..cut.clone() }), &[]);
        actions.get(..2) == Some(&[Action::SetReadonly(true), Action::Replay])
    };
    assert!(replayed(false, false) && replayed(true, false) && replayed(true, true));
    assert!(waits(&plan("a", &volume, Some(&Local { mounted: true, ..cut.clone() }), &[])), "a pod has it");
    let sealed = Local { sealed: true, ..cut.clone() };
    assert_eq!(reason(&plan("a", &volume, Some(&sealed), &[])), Some("KeyNeeded"));
    // A copy that isn't the newest is never the source of anything.
    assert_eq!(reason(&plan("a", &volume, Some(&copy(2, &[])), &[])), Some("EpochMismatch"));
    assert_eq!(reason(&plan("a", &volume, None, &[])), Some("DatasetMissing"));
    assert_eq!(plan("a", &moving(HandoffPhase::FinalSync), Some(&copy(3, &["portolan-4"])), &[]), []);
    assert_eq!(reason(&plan("a", &moving(HandoffPhase::FinalSync), Some(&copy(3, &[])), &[])), Some("SnapshotMissing"));
}

#[test]
fn a_target_is_recorded_receives_and_takes_over() {
    let unrecorded = {
        let mut volume = moving(HandoffPhase::FinalSync);
        volume.status.as_mut().unwrap().replicas.pop();
        volume
    };
    assert_eq!(plan("b", &unrecorded, None, &[]), [Action::RecordReplica]);
    assert_eq!(plan("b", &moving(HandoffPhase::Quiescing), None, &[]), []);
    // While the source has its turn the copy gets this attempt's epoch; one that isn't marked yet might be anybody's.
    let quiescing = moving(HandoffPhase::Quiescing);
    assert_eq!(plan("b", &quiescing, Some(&copy(2, &["portolan-2"])), &[]), [Action::Stamp(4)]);
    assert_eq!(plan("b", &quiescing, Some(&copy(4, &["portolan-2"])), &[]), []);
    assert_eq!(plan("b", &quiescing, Some(&Local { uid: None, ..copy(2, &["portolan-2"]) }), &[]), []);
    let volume = moving(HandoffPhase::FinalSync);
    let fetch = Action::Fetch(known("portolan-4"));
    assert_eq!(plan("b", &volume, None, &[]), std::slice::from_ref(&fetch));
    let stamped = Local { readonly: true, ..copy(4, &["portolan-2"]) };
    let activated = [Action::TakeOver("g-portolan-4".into()), Action::SetReadonly(false), Action::Finish];
    assert_eq!(plan("b", &volume, Some(&stamped), &[]), [&[fetch][..], &activated].concat());
    let mounted = Local { mounted: true, ..copy(2, &["portolan-2"]) };
    assert!(waits(&plan("b", &volume, Some(&mounted), &[])));
    let unmarked = Local { uid: None, epoch: None, ..copy(0, &["portolan-4"]) };
    let activated =
        [Action::TakeOver("g-portolan-4".into()), Action::Stamp(4), Action::SetReadonly(false), Action::Finish];
    assert_eq!(plan("b", &volume, Some(&unmarked), &[]), [&[Action::Adopt][..], &activated].concat());
    // The name alone is no proof: the GUID is.
    let impostor = Local { snapshots: vec![Known { name: "portolan-4".into(), guid: "other".into() }], ..copy(2, &[]) };
    let actions = plan("b", &volume, Some(&impostor), &[]);
    let before = actions.iter().take_while(|action| !matches!(action, Action::Fetch(_)));
    assert!(before.count() < actions.len(), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::RecordSnapshot(_))));
    assert!(!matches!(actions[0], Action::TakeOver(_)), "{actions:?}");
    let received = Local { readonly: true, ..copy(2, &["portolan-2", "portolan-4"]) };
    assert_eq!(plan("b", &volume, Some(&received), &[]), activated);
}

#[test]
fn a_final_snapshot_whose_write_was_lost_parts_nobody() {
    // b was the source before: it took portolan-3 and, not knowing that the write of it would still arrive, portolan-3-2.
    let local = copy(2, &["portolan-2", "portolan-3", "portolan-3-2"]);
    let mut volume = moving(HandoffPhase::FinalSync);
    volume.status.as_mut().unwrap().replicas[1] = replica("b", Some("portolan-3"));
    let fetch = Action::Fetch(known("portolan-4"));
    let actions = plan("b", &volume, Some(&local), &[]);
    assert_eq!(actions[..2], [Action::DestroySnapshot(known("portolan-3-2")), fetch]);
    // It is never taken for what the copies share.
    let at_rest =
        owned(|status| status.replicas = vec![replica("a", Some("portolan-3")), replica("b", Some("portolan-3"))]);
    let actions = plan("b", &at_rest, Some(&local), &[]);
    assert_eq!(actions, [known("portolan-2"), known("portolan-3-2")].map(Action::DestroySnapshot));
}

#[test]
fn a_new_owner_stamps_the_epoch_before_it_is_writable() {
    let volume = moving(HandoffPhase::Activating);
    let received = Local { readonly: true, ..copy(2, &["portolan-4"]) };
    assert_eq!(
        plan("b", &volume, Some(&received), &[]),
        [Action::Stamp(4), Action::SetReadonly(false), Action::Finish]
    );
    assert_eq!(plan("b", &volume, Some(&copy(4, &["portolan-4"])), &[]), [Action::Finish]);
    assert_eq!(reason(&plan("b", &volume, None, &[])), Some("DatasetMissing"));
    // The old owner does nothing, and its copy stays as it is.
    assert_eq!(plan("a", &volume, Some(&Local { readonly: true, ..copy(3, &["portolan-4"]) }), &[]), []);
}

#[test]
fn deletion_waits_for_the_mount_and_ends_with_the_entry() {
    let mut volume = owned(|_| {});
    volume.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
    let mounted = Local { mounted: true, ..copy(3, &[]) };
    assert!(waits(&plan("a", &volume, Some(&mounted), &[])));
    let cut_short = Local { open: true, readonly: true, ..mounted };
    assert_eq!(plan("a", &volume, Some(&cut_short), &[]), [Action::Replay], "only we would unmount it");
    assert_eq!(plan("a", &volume, Some(&copy(3, &[])), &[]), [Action::Destroy, Action::ForgetReplica]);
    assert_eq!(plan("a", &volume, None, &[]), [Action::ForgetReplica]);
    assert_eq!(plan("b", &volume, None, &[]), []);
}

#[test]
fn a_replica_is_recorded_as_long_as_its_dataset_is_there() {
    let volume = owned(|status| status.replicas.push(replica("b", Some("portolan-3"))));
    let local = Local { readonly: true, ..copy(2, &["portolan-2", "portolan-3"]) };
    assert_eq!(plan("b", &volume, Some(&local), &[]), [Action::DestroySnapshot(known("portolan-2"))]);
    assert_eq!(plan("b", &volume, None, &[]), [Action::ForgetReplica]);
    assert_eq!(plan("b", &owned(|_| {}), Some(&copy(2, &["portolan-3"])), &[]), [Action::RecordReplica]);
}

#[test]
fn a_volume_begins_as_a_snapshot() {
    let source = VolumeSource {
        snapshot: "s".into(),
        volume: "pvc-0".into(),
        short_name: "daily".into(),
        guid: "g-daily".into(),
    };
    let mut new = volume(|status| status.replicas = vec![replica("a", None)]);
    new.spec.source = Some(source);
    assert_eq!(plan("a", &new, None, &[]), [Action::Restore, Action::Own]);
    let steps = [Action::Restore, Action::ApplySpec, Action::Own];
    // Cut short: a clone, or a copy, that lacks its mark.
    let clone = Local { uid: None, origin: Some(("pvc-0".into(), "daily".into())), ..copy(1, &[]) };
    assert_eq!(plan("a", &new, Some(&clone), &[]), steps);
    let retired = Local { origin: Some(("pvc-0".into(), retired_name("g-daily"))), ..clone };
    assert_eq!(plan("a", &new, Some(&retired), &[]), steps);
    assert_eq!(plan("a", &new, Some(&Local { uid: None, ..copy(1, &["daily"]) }), &[]), steps);
    for foreign in [
        Local { uid: None, origin: Some(("pvc-0".into(), "weekly".into())), ..copy(1, &[]) },
        Local { uid: None, ..copy(1, &["daily", "weekly"]) },
        Local { uid: None, ..copy(1, &[]) },
    ] {
        assert_eq!(reason(&plan("a", &new, Some(&foreign), &[])), Some("DatasetConflict"), "{foreign:?}");
    }
}

#[test]
fn a_dataset_outlives_its_volume_while_a_snapshot_is_wanted() {
    let mut deleted = owned(|_| {});
    deleted.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
    let local = copy(3, &["daily", "portolan-3"]);
    let asked = Asked { object: "s".into(), short: "daily".into(), guid: Some("g-daily".into()), ..Asked::default() };
    assert_eq!(
        plan("a", &deleted, Some(&local), std::slice::from_ref(&asked)),
        [Action::Keep("its snapshots are kept: s".into())]
    );
    let going = Asked { deleting: true, ..asked };
    let acknowledged = Action::RecordDestroyed { object: "s".into() };
    assert_eq!(
        plan("a", &deleted, Some(&local), &[going]),
        [Action::DestroyTaken(known("daily")), acknowledged, Action::Destroy, Action::ForgetReplica]
    );
}

#[test]
fn a_changed_spec_is_applied_by_the_owner() {
    let mut grown = owned(|_| {});
    grown.spec.size_bytes = 1 << 30;
    assert_eq!(plan("a", &grown, Some(&copy(3, &["portolan-3"])), &[]), [Action::ApplySpec]);
    let replica = owned(|status| status.replicas.push(replica("b", Some("portolan-3"))));
    assert_eq!(plan("b", &replica, Some(&copy(2, &["portolan-3"])), &[]), []);
}

#[test]
fn an_import_is_known_by_its_guid_and_never_destroyed_before_it_is_owned() {
    let importing = |change: fn(&mut PortableVolumeStatus)| {
        let mut volume = volume(|status| status.replicas = vec![replica("a", None)]);
        volume.spec.import = Some(portolan_crds::VolumeImport { dataset: "tank/old".into() });
        change(volume.status.as_mut().unwrap());
        volume
    };
    let at_place = |guid: &str| Local { dataset: "tank/p/pvc-1".into(), guid: guid.into(), ..Local::default() };
    let (fresh, begun) = (importing(|_| {}), importing(|status| status.import_guid = Some("7".into())));
    assert_eq!(plan("a", &fresh, None, &[]), [Action::Import, Action::Own]);
    let import = [Action::Import, Action::ApplySpec, Action::Own];
    // Renamed, and cut short before it was marked.
    assert_eq!(plan("a", &begun, Some(&at_place("7")), &[]), import);
    for (volume, guid) in [(&begun, "8"), (&fresh, "7")] {
        assert_eq!(reason(&plan("a", volume, Some(&at_place(guid)), &[])), Some("DatasetConflict"));
    }
    // Made at its place by hand.
    let mut here = fresh.clone();
    here.spec.import = Some(portolan_crds::VolumeImport { dataset: "tank/p/pvc-1".into() });
    assert_eq!(plan("a", &here, Some(&at_place("7")), &[]), import);
    // Owned: the GUID alone means nothing any more.
    let owned = importing(|status| (status.owner, status.import_guid) = (Some("a".into()), Some("7".into())));
    assert_eq!(reason(&plan("a", &owned, Some(&at_place("7")), &[])), Some("DatasetConflict"));

    let marked = Local { epoch: Some(1), uid: Some(UID.into()), ..at_place("7") };
    for local in [at_place("7"), marked] {
        let mut elsewhere = begun.clone();
        elsewhere.spec.placement.node = "b".into();
        assert_eq!(reason(&plan("a", &elsewhere, Some(&local), &[])), Some("ImportElsewhere"));
        let mut deleted = begun.clone();
        deleted.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(plan("a", &deleted, Some(&local), &[]), [Action::ForgetReplica]);
    }
}

/// The volume of a, copied to b before it moves at epoch 4.
fn copying(round: Option<&str>, received: Option<&str>, warm: bool) -> PortableVolume {
    owned(|status| {
        let guid = round.map(|name| format!("g-{name}"));
        status.handoff = Some(Handoff {
            from: "a".into(),
            to: "b".into(),
            epoch: 4,
            phase: HandoffPhase::PreCopy,
            snapshot: round.map(Into::into),
            round_guid: guid.clone(),
            guid,
            warm,
            ..Handoff::default()
        });
        status.replicas = vec![replica("a", received.or(Some("portolan-3"))), replica("b", received)];
    })
}

#[test]
fn a_source_takes_a_round_when_the_last_has_come_until_it_is_warm() {
    let round = |name: &str| [Action::PublishRound { name: name.into(), rests: false }];
    let mounted = |snapshots: &[&str]| Local { mounted: true, ..copy(3, snapshots) };
    assert_eq!(plan("a", &copying(None, None, false), Some(&mounted(&["portolan-3"])), &[]), round("portolan-4"));
    let first = mounted(&["portolan-3", "portolan-4"]);
    assert_eq!(plan("a", &copying(Some("portolan-4"), None, false), Some(&first), &[]), []);
    let come = copying(Some("portolan-4"), Some("portolan-4"), false);
    let prune = Action::DestroySnapshot(known("portolan-3"));
    assert_eq!(plan("a", &come, Some(&first), &[]), [&[prune.clone()][..], &round("portolan-4-2")].concat());
    let warm = copying(Some("portolan-4"), Some("portolan-4"), true);
    assert_eq!(plan("a", &warm, Some(&first), &[]), [prune]);
    // Destroyed by hand before it was fetched; its name is not used again.
    let lost = mounted(&["portolan-3"]);
    assert_eq!(plan("a", &copying(Some("portolan-4"), None, false), Some(&lost), &[]), round("portolan-4-2"));
}

#[test]
fn a_target_records_each_round_that_has_come() {
    let volume = copying(Some("portolan-4"), None, false);
    assert_eq!(plan("b", &volume, None, &[]), [Action::Fetch(known("portolan-4"))]);
    let record = Action::RecordRound("g-portolan-4".into());
    let unmarked = Local { uid: None, epoch: None, ..copy(0, &["portolan-4"]) };
    assert_eq!(plan("b", &volume, Some(&unmarked), &[]), [Action::Adopt, record]);
    let come = copying(Some("portolan-4"), Some("portolan-4"), false);
    let here = copy(2, &["portolan-2", "portolan-4"]);
    assert_eq!(plan("b", &come, Some(&here), &[]), [Action::DestroySnapshot(known("portolan-2"))]);
    let next = copying(Some("portolan-4-2"), Some("portolan-4"), false);
    let recorded = Action::RecordRound("g-portolan-4-2".into());
    assert_eq!(plan("b", &next, Some(&here), &[]), [Action::Fetch(known("portolan-4-2")), recorded]);
}

#[test]
fn what_a_copy_has_of_people_is_said_before_any_of_it_goes() {
    let taken = Known { name: "daily".into(), guid: "5".into() };
    let going =
        Asked { object: "s".into(), short: "daily".into(), guid: Some("5".into()), deleting: true, ..Asked::default() };
    let aborted = |shared: Option<&str>, heard: bool| {
        owned(|status| {
            let guid = (!heard).then(|| "g-portolan-4".to_owned());
            let (outcome, to) = (HandoffOutcome::Aborted, "b".to_owned());
            status.last_handoff = Some(HandoffReport { outcome, to, epoch: 4, guid, ..HandoffReport::default() });
            let shared = Replica { node: "b".into(), snapshot: None, guid: shared.map(Into::into) };
            status.replicas = vec![replica("a", Some("portolan-3")), shared];
        })
    };
    let planned = |volume: &PortableVolume, snapshots: Vec<Known>| {
        let local = Local { readonly: true, snapshots, epoch: None, ..copy(0, &[]) };
        plan("b", volume, Some(&local), std::slice::from_ref(&going))
    };
    let said = [Action::RecordSnapshot(taken.clone())];
    assert_eq!(planned(&aborted(None, false), vec![taken.clone()]), said);
    assert_eq!(planned(&aborted(Some("g-portolan-3"), false), vec![known("portolan-3"), taken.clone()]), said);
    assert_eq!(planned(&aborted(Some("5"), false), vec![taken.clone()]), said, "the source waits to hear it");
    let ended = [Action::Retire(taken.clone()), Action::RecordDestroyed { object: "s".into() }];
    assert_eq!(planned(&aborted(Some("5"), true), vec![taken.clone()]), ended);
    // A volume that goes takes all along.
    let mut deleted = aborted(Some("5"), true);
    deleted.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
    assert_eq!(planned(&deleted, vec![taken.clone()])[0], Action::DestroyTaken(taken));
}

#[test]
fn what_came_before_an_abort_is_recorded_and_kept() {
    let aborted = owned(|status| {
        let (to, guid) = ("b".to_owned(), Some("g-portolan-4-2".to_owned()));
        let outcome = HandoffOutcome::Aborted;
        let report = HandoffReport { outcome, to, epoch: 4, round_guid: guid, ..HandoffReport::default() };
        status.last_handoff = Some(report);
        status.replicas = vec![replica("a", Some("portolan-3")), replica("b", Some("portolan-3"))];
    });
    let came = copy(2, &["portolan-3", "portolan-4-2"]);
    assert_eq!(plan("b", &aborted, Some(&came), &[]), [Action::RecordSnapshot(known("portolan-4-2"))]);
    assert_eq!(
        plan("a", &aborted, Some(&copy(3, &["portolan-3", "portolan-4", "portolan-4-2"])), &[]),
        [Action::DestroySnapshot(known("portolan-4"))]
    );
}
