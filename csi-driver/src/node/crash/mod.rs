//! `kill -9` at each step of each verb: just before and just after each thing by which an agent changes disk or API, and once more soon after
//! its next start. Then all is as if nobody had been killed, also if what comes next is asked for at that moment; or, if everything is deleted
//! instead, nothing is left.
//!
//! What stays after a kill is what is on the disk, in the mount table and in the API: the agent is dropped where it stands, and another is made
//! that knows nothing else. Zvols' devices are the kernel's, and not here: see `tests/block.rs`.

mod failures;
mod fate;
mod host;
mod kubelet;
mod last_round;
mod picture;
mod reading;
mod resuming;
mod rules;
mod waiting;
mod world;

use portolan_crds::{Compression, Filesystem, SnapshotGroup, VolumeImport, VolumeSource};
use portolan_zfs::memory::Fault;
use portolan_zfs::{Capabilities, ErrorKind, Property, Zfs};

use fate::{Blow, When};
use kube::api::{DeleteParams, Patch, PatchParams};
use kubelet::{END, START};
use world::{World, name};

use crate::volume::open_property;

/// What somebody asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verb {
    Create,
    CreateZvol,
    /// Wanted elsewhere before it was anybody's.
    Withdraw,
    /// From a snapshot on the same node.
    Clone,
    /// From a snapshot on another node.
    Copy,
    Snapshot,
    Group,
    /// Of a volume that was in use when its node failed.
    SnapshotAfterFailure,
    /// The same, and a pod that uses it starts at that moment.
    MountAfterFailure,
    /// The same, of two.
    GroupAfterFailure,
    /// The same, to a node that never had it.
    MoveAfterFailure,
    Modify,
    ModifyZvol,
    Import,
    /// A pod's start.
    Mount,
    /// A pod's end.
    Unmount,
    /// A pod ends on one node and starts on another.
    Relocate,
    /// A pod ends on one node, from which most of the volume has come to another, and starts there.
    RelocateWarm,
    /// To a node that never had the volume.
    Move,
    /// To one that had it.
    Return,
    /// A copied volume, to the node that it was copied from.
    Follow,
    DeleteSnapshot,
    /// All that an aborted move has brought; then it moves there.
    DeleteBase,
    /// The target of a move has said that it has none any more, and the source still has one.
    DeleteOnTheWay,
    /// Of which there are two copies.
    Delete,
    /// Of which there is a clone, which goes later.
    DeleteOrigin,
    /// Of which there is a snapshot, which goes later.
    DeleteKept,
    /// A volume that nobody writes, from a snapshot on another node.
    CopyToRead,
    /// What is to be it is there already, and may not have been mounted since its node failed.
    ImportToRead,
    /// A pod on a second node begins to read.
    Read,
    /// A pod on one of two nodes ends.
    EndReading,
    /// It gets another owner, which has a copy.
    GiveAway,
    /// Of which there are two copies.
    DeleteRead,
}

impl Verb {
    /// What was before.
    async fn prepare(self, world: &mut World) {
        match self {
            Self::Create | Self::CreateZvol => return,
            Self::Withdraw => {
                world.begin(&[Blow { effect: 2, when: When::After }]);
                world.ask_volume("db", "a", |_| ()).await;
                assert!(world.settle_unless_killed().await);
                return;
            }
            Self::ModifyZvol => {
                world.ask_volume("db", "a", |spec| spec.filesystem = Filesystem::Ext4).await;
                return world.settle().await;
            }
            Self::Read | Self::EndReading | Self::GiveAway | Self::DeleteRead | Self::CopyToRead => {
                return reading::prepare(self, world).await;
            }
            Self::Import | Self::ImportToRead => {
                let (pool, old) = (&world.pools["a"], name("tank/old"));
                pool.create_filesystem(&old, &[Property::new("mountpoint", "/srv/old").unwrap()], None).await.unwrap();
                pool.mount(&old).await.unwrap();
                pool.write(&old, b"dear").unwrap();
                pool.snapshot(&old.snapshot("daily").unwrap()).await.unwrap();
                return world.expect("db", "dear");
            }
            _ => {}
        }
        world.ask_volume("db", "a", |_| ()).await;
        world.settle().await;
        world.write("db", "first").await;
        match self {
            Self::Clone
            | Self::Copy
            | Self::DeleteSnapshot
            | Self::DeleteBase
            | Self::DeleteOrigin
            | Self::DeleteKept
            | Self::Follow => {
                world.ask_snapshot("s", "db", |_| ()).await;
                world.settle().await;
                world.write("db", "second").await;
            }
            Self::Group | Self::GroupAfterFailure => {
                for (other, data) in [("log", "third"), ("bystander", "fourth")] {
                    world.ask_volume(other, "a", |_| ()).await;
                    world.settle().await;
                    world.write(other, data).await;
                }
            }
            _ => {}
        }
        match self {
            Self::Return | Self::Delete | Self::DeleteSnapshot | Self::DeleteKept => {
                world.ask_move("db", "b").await;
                world.settle().await;
                world.write("db", "on b").await;
            }
            Self::Unmount | Self::Relocate => world.ask_kubelet("a", START),
            Self::RelocateWarm => {
                world.ask_kubelet("a", START);
                last_round::ask_warm(world, "b").await;
            }
            Self::SnapshotAfterFailure | Self::MountAfterFailure | Self::MoveAfterFailure => {
                fail_in_use(world, &["db"]).await
            }
            Self::GroupAfterFailure => fail_in_use(world, &["db", "log"]).await,
            Self::DeleteOrigin => begin_as_snapshot(world, "a").await,
            Self::DeleteBase => return bring_one_snapshot(world).await,
            Self::DeleteOnTheWay => {
                for to in ["b", "a"] {
                    world.ask_move("db", to).await;
                    world.settle().await;
                }
                world.ask_snapshot("s", "db", |_| ()).await;
                world.settle().await;
                world.write("db", "second").await;
            }
            Self::Follow => begin_as_snapshot(world, "b").await,
            _ => {}
        }
        world.settle().await;
    }

    /// What is asked for.
    async fn ask(self, world: &mut World) {
        match self {
            Self::Create => {
                world.ask_volume("db", "a", |spec| spec.parameters.compression = Some(Compression::Gzip)).await;
            }
            Self::Withdraw => {
                let patch = Patch::Merge(serde_json::json!({ "spec": { "placement": { "node": "b" } } }));
                world.volumes().patch("db", &PatchParams::default(), &patch).await.unwrap();
            }
            Self::Mount => world.ask_kubelet("a", START),
            Self::MountAfterFailure => {
                world.ask_snapshot("s", "db", |_| ()).await;
                world.ask_kubelet("a", START);
            }
            Self::Unmount | Self::RelocateWarm => world.ask_kubelet("a", END),
            Self::Relocate => {
                world.ask_kubelet("a", END);
                world.ask_move("db", "b").await;
                world.ask_kubelet("b", START);
            }
            Self::CreateZvol => world.ask_volume("db", "a", |spec| spec.filesystem = Filesystem::Ext4).await,
            Self::Clone => begin_as_snapshot(world, "a").await,
            Self::Copy => begin_as_snapshot(world, "b").await,
            Self::Snapshot | Self::SnapshotAfterFailure => world.ask_snapshot("s", "db", |_| ()).await,
            Self::Group | Self::GroupAfterFailure => {
                for (snapshot, volume) in [("s1", "db"), ("s2", "log")] {
                    let group = Some(SnapshotGroup { name: "g".into(), members: 2 });
                    let ask = |spec: &mut portolan_crds::PortableSnapshotSpec| {
                        (spec.group, spec.snapshot) = (group, Some("group-g".into()));
                    };
                    world.ask_snapshot(snapshot, volume, ask).await;
                }
            }
            Self::Modify | Self::ModifyZvol => grow(world, "db").await,
            Self::Import | Self::ImportToRead => {
                let import = Some(VolumeImport { dataset: "tank/old".into() });
                let read_only = self == Self::ImportToRead;
                world.ask_volume("db", "a", |spec| (spec.import, spec.read_only) = (import, read_only)).await;
            }
            Self::CopyToRead => reading::ask(world, "b").await,
            Self::Read => {
                reading::ask_copy(world, "b").await;
                world.ask_kubelet("b", START);
            }
            Self::EndReading => world.ask_kubelet("b", END),
            Self::Move | Self::MoveAfterFailure | Self::GiveAway => world.ask_move("db", "b").await,
            Self::Return => world.ask_move("db", "a").await,
            Self::Follow => world.ask_move("new", "a").await,
            Self::DeleteBase => {
                world.ask_abort("db").await;
                world.snapshots().delete("s", &DeleteParams::default()).await.unwrap();
            }
            Self::DeleteOnTheWay => {
                world.snapshots().delete("s", &DeleteParams::default()).await.unwrap();
                world.look_all("b").await;
                world.ask_move("db", "b").await;
            }
            Self::DeleteSnapshot => _ = world.snapshots().delete("s", &DeleteParams::default()).await.unwrap(),
            Self::Delete | Self::DeleteOrigin | Self::DeleteKept | Self::DeleteRead => {
                world.volumes().delete("db", &DeleteParams::default()).await.unwrap();
            }
        }
    }

    /// What is asked for when that is done, or before.
    async fn ask_then(self, world: &mut World) {
        match self {
            Self::Create | Self::CreateZvol | Self::Import | Self::CopyToRead => grow(world, "db").await,
            Self::Clone | Self::Copy => grow(world, "new").await,
            Self::DeleteOrigin | Self::DeleteKept => world.delete_all().await,
            Self::DeleteBase => world.ask_move("db", "b").await,
            Self::RelocateWarm => {
                world.ask_move("db", "b").await;
                world.ask_kubelet("b", START);
            }
            _ => {}
        }
    }

    fn has_pod(self) -> bool {
        let before = matches!(self, Self::Mount | Self::MountAfterFailure | Self::Unmount | Self::Relocate);
        before || matches!(self, Self::RelocateWarm | Self::Read | Self::EndReading)
    }
}

/// Changes what a volume is to be.
async fn grow(world: &World, volume: &str) {
    let change = serde_json::json!({ "sizeBytes": 2 << 20, "parameters": { "compression": "gzip" } });
    let patch = Patch::Merge(serde_json::json!({ "spec": change }));
    world.volumes().patch(volume, &PatchParams::default(), &patch).await.unwrap();
}

/// Node a has lost its power while pods there had these volumes.
async fn fail_in_use(world: &World, volumes: &[&str]) {
    for volume in volumes {
        let dataset = name("tank/portolan").child(volume).unwrap();
        world.pools["a"].set_property(&dataset, &open_property(true).unwrap()).await.unwrap();
    }
}

/// Asks for a volume that begins as the snapshot.
async fn begin_as_snapshot(world: &World, node: &str) {
    let snapshot = world.snapshots().get("s").await.unwrap();
    let guid = snapshot.guid().unwrap().to_owned();
    let source = VolumeSource { snapshot: "s".into(), volume: "db".into(), short_name: "s".into(), guid };
    world.expect("new", "first");
    world.ask_volume("new", node, |spec| spec.source = Some(source)).await;
}

/// Has a move bring a person's snapshot and no more.
async fn bring_one_snapshot(world: &mut World) {
    world.ask_move("db", "b").await;
    world.look_all("a").await;
    world.pools["a"].inject("send", 2, Fault::Fail(ErrorKind::Timeout));
    world.look_all("b").await;
    let picture = world.picture();
    let copy = picture.lines().skip_while(|line| !line.starts_with("b: tank/portolan/db"));
    let snapshots: Vec<&str> = copy.filter(|line| line.starts_with("    @")).collect();
    assert!(matches!(snapshots[..], [only] if only.starts_with("    @s ")), "{picture}");
}

/// What people do about a kill.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    /// They don't notice.
    Nothing,
    /// They ask for what comes next at once.
    Next,
    /// They delete everything.
    Delete,
}

/// What became of it: a picture of the end, and what the agents did on the way.
async fn run(verb: Verb, capabilities: Capabilities, blows: &[Blow], then: Then) -> (String, Vec<String>) {
    let mut world = World::new(capabilities).await;
    // On the heap: unoptimised, all of them together are too much for a test's stack.
    Box::pin(verb.prepare(&mut world)).await;
    world.begin(blows);
    Box::pin(verb.ask(&mut world)).await;
    let mut killed = match then {
        Then::Nothing => {
            world.settle().await;
            false
        }
        Then::Next | Then::Delete => world.settle_unless_killed().await,
    };
    if !killed || then == Then::Next {
        Box::pin(verb.ask_then(&mut world)).await;
        killed = then == Then::Delete && world.settle_unless_killed().await;
    }
    if killed || then == Then::Delete {
        world.delete_all().await;
        if verb.has_pod() {
            world.end_pods();
        }
    }
    world.settle().await;
    let (wrong, effects) = (world.fate.wrong(), world.fate.effects());
    assert!(wrong.is_empty(), "{verb:?}, killed {blows:?}, then {then:?}: {wrong:#?}\n{effects:#?}");
    (world.picture(), effects)
}

/// Whether nothing is left but what somebody had before Portolan came.
fn nothing_is_left(verb: Verb, picture: &str) -> bool {
    let imports = matches!(verb, Verb::Import | Verb::ImportToRead);
    let theirs = |line: &str| imports && (line.starts_with("a: tank/") || line.starts_with("    "));
    picture.lines().all(|line| line.ends_with(": 0 snapshots of the parent") || theirs(line))
}

async fn killed_anywhere(verb: Verb, capabilities: Capabilities) {
    let (wanted, effects) = run(verb, capabilities, &[], Then::Nothing).await;
    assert!(effects.len() > 1, "{verb:?}: {effects:?}");
    assert!(!wanted.contains("StepFailed"), "{wanted}");
    for (at, effect) in effects.iter().enumerate() {
        for when in [When::Before, When::After] {
            let first = Blow { effect: at + 1, when };
            let check = async |blows: &[Blow], then: Then| {
                let (got, on_the_way) = run(verb, capabilities, blows, then).await;
                let as_wanted = if then == Then::Delete { nothing_is_left(verb, &got) } else { got == wanted };
                assert!(
                    as_wanted,
                    "{verb:?}, killed {when:?} {effect:?} ({blows:?}), then {then:?}:\n{}\nby {on_the_way:#?}",
                    difference(&wanted, &got)
                );
            };
            for then in [Then::Nothing, Then::Next, Then::Delete] {
                check(&[first], then).await;
            }
            for again in 1..=2 {
                check(&[first, Blow { effect: again, when: When::After }], Then::Nothing).await;
            }
        }
    }
}

/// The lines that only one of them has, or has more often.
fn difference(wanted: &str, got: &str) -> String {
    let only = |these: &str, those: &str, sign: char| {
        let mut those: Vec<&str> = those.lines().collect();
        let common = |line: &&str| those.iter().position(|other| other == line).map(|at| those.remove(at)).is_none();
        these.lines().filter(common).map(|line| format!("{sign} {line}\n")).collect::<String>()
    };
    only(wanted, got, '-') + &only(got, wanted, '+')
}

macro_rules! verbs {
    ($($name:ident: $verb:ident;)*) => {$(
        #[tokio::test]
        async fn $name() {
            for capabilities in [Capabilities::default(), Capabilities::all()] {
                if matches!(Verb::$verb, Verb::CreateZvol | Verb::ModifyZvol) && !capabilities.zvol {
                    continue;
                }
                killed_anywhere(Verb::$verb, capabilities).await;
            }
        }
    )*};
}

verbs! {
    create: Create;
    create_zvol: CreateZvol;
    withdraw: Withdraw;
    clone: Clone;
    copy: Copy;
    snapshot: Snapshot;
    group: Group;
    snapshot_after_a_failure: SnapshotAfterFailure;
    mount_after_a_failure: MountAfterFailure;
    group_after_a_failure: GroupAfterFailure;
    move_after_a_failure: MoveAfterFailure;
    modify: Modify;
    modify_zvol: ModifyZvol;
    import: Import;
    mount: Mount;
    unmount: Unmount;
    relocate: Relocate;
    relocate_warm: RelocateWarm;
    move_away: Move;
    move_back: Return;
    move_to_the_origin: Follow;
    delete_snapshot: DeleteSnapshot;
    delete_base: DeleteBase;
    delete_on_the_way: DeleteOnTheWay;
    delete: Delete;
    delete_origin: DeleteOrigin;
    delete_kept: DeleteKept;
    copy_to_read: CopyToRead;
    import_to_read: ImportToRead;
    read: Read;
    end_reading: EndReading;
    give_away: GiveAway;
    delete_read: DeleteRead;
}
