//! `kill -9` at each step of each verb: just before and just after each thing by which an agent changes disk or API, and once more soon after
//! its next start. Then either all is as if nobody had been killed, or, if everything is deleted instead, nothing is left.
//!
//! What stays after a kill is what is on the disk and in the API: the agent is dropped where it stands, and another is made that knows
//! nothing else. Mounts are not here: they are the kernel's, see `tests/`.

mod fate;
mod picture;
mod rules;
mod world;

use portolan_crds::{Compression, Filesystem, SnapshotGroup, VolumeImport, VolumeSource};
use portolan_zfs::{Capabilities, Property, Zfs};

use fate::{Blow, When};
use kube::api::{DeleteParams, Patch, PatchParams};
use world::{World, name};

/// What somebody asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verb {
    Create,
    CreateZvol,
    /// From a snapshot on the same node.
    Clone,
    /// From a snapshot on another node.
    Copy,
    Snapshot,
    Group,
    Modify,
    Import,
    /// To a node that never had the volume.
    Move,
    /// To one that had it.
    Return,
    /// A copied volume, to the node that it was copied from.
    Follow,
    DeleteSnapshot,
    /// Of which there are two copies.
    Delete,
    /// Of which there is a clone, which goes later.
    DeleteOrigin,
    /// Of which there is a snapshot, which goes later.
    DeleteKept,
}

impl Verb {
    /// What was before.
    async fn prepare(self, world: &mut World) {
        match self {
            Self::Create | Self::CreateZvol => return,
            Self::Import => {
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
        world.settle(false).await;
        world.write("db", "first").await;
        match self {
            Self::Clone | Self::Copy | Self::DeleteSnapshot | Self::DeleteOrigin | Self::DeleteKept | Self::Follow => {
                world.ask_snapshot("s", "db", |_| ()).await;
                world.settle(false).await;
                world.write("db", "second").await;
            }
            Self::Group => {
                for (other, data) in [("log", "third"), ("bystander", "fourth")] {
                    world.ask_volume(other, "a", |_| ()).await;
                    world.settle(false).await;
                    world.write(other, data).await;
                }
            }
            _ => {}
        }
        match self {
            Self::Return | Self::Delete | Self::DeleteSnapshot | Self::DeleteKept => {
                world.ask_move("db", "b").await;
                world.settle(false).await;
                world.write("db", "on b").await;
            }
            Self::DeleteOrigin => begin_as_snapshot(world, "a").await,
            Self::Follow => begin_as_snapshot(world, "b").await,
            _ => {}
        }
        world.settle(false).await;
    }

    /// What is asked for.
    async fn ask(self, world: &mut World) {
        match self {
            Self::Create => {
                world.expect("db", "");
                world.ask_volume("db", "a", |spec| spec.parameters.compression = Some(Compression::Gzip)).await;
            }
            Self::CreateZvol => world.ask_volume("db", "a", |spec| spec.filesystem = Filesystem::Ext4).await,
            Self::Clone => begin_as_snapshot(world, "a").await,
            Self::Copy => begin_as_snapshot(world, "b").await,
            Self::Snapshot => world.ask_snapshot("s", "db", |_| ()).await,
            Self::Group => {
                for (snapshot, volume) in [("s1", "db"), ("s2", "log")] {
                    let group = Some(SnapshotGroup { name: "g".into(), members: 2 });
                    let ask = |spec: &mut portolan_crds::PortableSnapshotSpec| {
                        (spec.group, spec.snapshot) = (group, Some("group-g".into()));
                    };
                    world.ask_snapshot(snapshot, volume, ask).await;
                }
            }
            Self::Modify => {
                let change = serde_json::json!({ "sizeBytes": 2 << 20, "parameters": { "compression": "gzip" } });
                let patch = Patch::Merge(serde_json::json!({ "spec": change }));
                world.volumes().patch("db", &PatchParams::default(), &patch).await.unwrap();
            }
            Self::Import => {
                let import = Some(VolumeImport { dataset: "tank/old".into() });
                world.ask_volume("db", "a", |spec| spec.import = import).await;
            }
            Self::Move => world.ask_move("db", "b").await,
            Self::Return => world.ask_move("db", "a").await,
            Self::Follow => world.ask_move("new", "a").await,
            Self::DeleteSnapshot => _ = world.snapshots().delete("s", &DeleteParams::default()).await.unwrap(),
            Self::Delete | Self::DeleteOrigin | Self::DeleteKept => {
                world.volumes().delete("db", &DeleteParams::default()).await.unwrap();
            }
        }
    }

    /// What is asked for when that is done.
    async fn ask_then(self, world: &mut World) {
        if matches!(self, Self::DeleteOrigin | Self::DeleteKept) {
            world.delete_all().await;
        }
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

/// What became of it: a picture of the end, and what the agents did on the way.
async fn run(verb: Verb, capabilities: Capabilities, blows: &[Blow], deletes: bool) -> (String, Vec<String>) {
    let mut world = World::new(capabilities).await;
    verb.prepare(&mut world).await;
    world.begin(blows);
    verb.ask(&mut world).await;
    world.settle(deletes).await;
    if !deletes {
        verb.ask_then(&mut world).await;
        world.settle(false).await;
    }
    let wrong = world.fate.wrong();
    let effects = world.fate.effects();
    assert!(wrong.is_empty(), "{verb:?}, killed {blows:?}: {wrong:#?}\n{effects:#?}");
    (world.picture(), effects)
}

/// Whether nothing is left but what somebody had before Portolan came.
fn nothing_is_left(verb: Verb, picture: &str) -> bool {
    let left = picture.lines().filter(|line| !line.ends_with(": 0 snapshots of the parent"));
    let left: Vec<&str> = left.collect();
    left.is_empty() || (verb == Verb::Import && left.iter().all(|line| line.starts_with("a: tank/") || line.starts_with("    ")))
}

async fn killed_anywhere(verb: Verb, capabilities: Capabilities) {
    let (wanted, effects) = run(verb, capabilities, &[], false).await;
    assert!(effects.len() > 1, "{verb:?}: {effects:?}");
    assert!(!wanted.contains("StepFailed"), "{wanted}");
    for (at, effect) in effects.iter().enumerate() {
        for when in [When::Before, When::After] {
            let first = Blow { effect: at + 1, when };
            let again = [1, 2, 3].map(|effect| vec![first, Blow { effect, when: When::After }]);
            for blows in again.into_iter().chain([vec![first]]) {
                let (got, on_the_way) = run(verb, capabilities, &blows, false).await;
                assert!(
                    got == wanted,
                    "{verb:?}, killed {when:?} {effect:?} ({blows:?}):\n{got}\nand not\n{wanted}\nby {on_the_way:#?}"
                );
            }
            let (got, on_the_way) = run(verb, capabilities, &[first], true).await;
            assert!(
                nothing_is_left(verb, &got),
                "{verb:?}, killed {when:?} {effect:?} and deleted: there is\n{got}\nby {on_the_way:#?}"
            );
        }
    }
}

macro_rules! verbs {
    ($($name:ident: $verb:ident;)*) => {$(
        #[tokio::test]
        async fn $name() {
            for capabilities in [Capabilities::default(), Capabilities::all()] {
                if Verb::$verb == Verb::CreateZvol && !capabilities.zvol {
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
    clone: Clone;
    copy: Copy;
    snapshot: Snapshot;
    group: Group;
    modify: Modify;
    import: Import;
    move_away: Move;
    move_back: Return;
    move_to_the_origin: Follow;
    delete_snapshot: DeleteSnapshot;
    delete: Delete;
    delete_origin: DeleteOrigin;
    delete_kept: DeleteKept;
}
