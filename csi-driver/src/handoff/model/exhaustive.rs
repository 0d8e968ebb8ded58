//! Every history up to some number of moves, kills, aborts and writes, by stateright.

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::{Happening, NODES, Weakness, World};

/// How often the things happen that need not.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
struct Budget {
    wants: u8,
    kills: u8,
    aborts: u8,
    mounts: u8,
    writes: u8,
    cuts: u8,
    deletes: u8,
    snapshots: u8,
    drops: u8,
}

struct Cluster {
    nodes: usize,
    budget: Budget,
    weakness: Weakness,
}

#[derive(Clone, Debug, Hash, PartialEq)]
struct Moment {
    world: World,
    left: Budget,
}

impl Cluster {
    fn possible(&self, moment: &Moment) -> Vec<Happening> {
        let (left, world) = (moment.left, &moment.world);
        let mut all: Vec<Happening> = (0..self.nodes).map(Happening::Step).collect();
        for node in 0..self.nodes {
            if left.kills > 0 && world.is_busy(node) {
                all.extend([Happening::Kill(node), Happening::KillSending(node)]);
            }
            if left.wants > 0 {
                all.extend([Happening::Want(node), Happening::WantWarm(node)]);
            }
            if left.cuts > 0 {
                all.push(Happening::PowerCut(node));
            }
            if left.mounts > 0 {
                all.push(Happening::Mount(node));
                if left.kills > 0 {
                    all.push(Happening::MountLate(node));
                }
            }
            if world.disks[node].as_ref().is_some_and(|disk| disk.local.mounted) {
                all.push(Happening::Unmount(node));
            }
        }
        if world.has_late() {
            all.push(Happening::Arrive);
        }
        if world.has_late_mount() {
            all.push(Happening::MountComes);
        }
        if left.aborts > 0 {
            all.push(Happening::Abort);
        }
        if left.writes > 0 {
            all.push(Happening::Write);
        }
        if left.deletes > 0 {
            all.push(Happening::Delete);
        }
        if left.snapshots > 0 {
            all.push(Happening::WantSnapshot);
        }
        if left.drops > 0 {
            all.push(Happening::DropSnapshot);
        }
        all
    }
}

impl Budget {
    fn spend(&mut self, happening: &Happening) {
        match happening {
            Happening::Kill(_) | Happening::KillSending(_) => self.kills -= 1,
            Happening::Want(_) | Happening::WantWarm(_) => self.wants -= 1,
            Happening::Mount(_) => self.mounts -= 1,
            Happening::MountLate(_) => (self.mounts, self.kills) = (self.mounts - 1, self.kills - 1),
            Happening::Abort => self.aborts -= 1,
            Happening::Write => self.writes -= 1,
            Happening::PowerCut(_) => self.cuts -= 1,
            Happening::Delete => self.deletes -= 1,
            Happening::WantSnapshot => self.snapshots -= 1,
            Happening::DropSnapshot => self.drops -= 1,
            Happening::Step(_) | Happening::Arrive | Happening::MountComes | Happening::Unmount(_) => {}
        }
    }
}

impl Model for Cluster {
    type State = Moment;
    type Action = Happening;

    fn init_states(&self) -> Vec<Moment> {
        vec![Moment { world: World::owned(self.weakness), left: self.budget }]
    }

    fn actions(&self, moment: &Moment, actions: &mut Vec<Happening>) {
        actions.extend(self.possible(moment));
    }

    fn next_state(&self, moment: &Moment, happening: Happening) -> Option<Moment> {
        let mut next = moment.clone();
        next.world.happen(&happening);
        // What changes nothing costs nothing.
        if next.world == moment.world {
            return None;
        }
        next.left.spend(&happening);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("one writer, nothing lost, no epoch twice", |_, moment| {
                moment.world.wrong.is_none()
            }),
            Property::<Self>::always("whatever has happened, it can end well on any node", |cluster, moment| {
                // What people do with snapshots makes no copy a stranger. A round's write that is late may.
                let Budget { snapshots, kills, .. } = cluster.budget;
                let is_well = |out_of_the_way| snapshots == 0 || kills > 0 || out_of_the_way == 0;
                (0..cluster.nodes).all(|node| moment.world.clone().settle(node).is_ok_and(is_well))
            }),
        ]
    }
}

fn check(nodes: usize, budget: Budget, weakness: Weakness) -> (usize, Vec<String>) {
    assert!(nodes <= NODES.len());
    let checker = Cluster { nodes, budget, weakness }
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let found = checker.discoveries();
    let told = found.into_iter().map(|(name, path)| format!("{name}: {:?}", path.into_actions())).collect();
    (checker.unique_state_count(), told)
}

/// What a volume goes through, each kind of trouble with those that it can meet: all of them at once are too many histories.
#[test]
fn every_short_history_of_two_nodes_ends_well() {
    let moves = Budget { wants: 2, kills: 1, aborts: 1, mounts: 1, writes: 1, ..Budget::default() };
    let cuts = Budget { wants: 1, cuts: 1, mounts: 2, writes: 2, kills: 1, ..Budget::default() };
    let deletion = Budget { wants: 1, deletes: 1, kills: 1, mounts: 1, aborts: 1, ..Budget::default() };
    let people = Budget { wants: 1, aborts: 1, snapshots: 1, drops: 1, ..Budget::default() };
    for budget in [moves, cuts, deletion, people] {
        let (states, found) = check(2, budget, Weakness::None);
        println!("the handoff's model: {states} states with {budget:?}");
        assert_eq!(found, Vec::<String>::new(), "{budget:?}");
    }
}

#[test]
fn a_snapshot_goes_along_and_outlives_its_volume() {
    let mut world = World::owned(Weakness::None);
    world.happen(&Happening::WantSnapshot);
    for _ in 0..4 {
        world.happen(&Happening::Step(0));
    }
    assert_eq!(world.clone().settle(1), Ok(0));
    world.happen(&Happening::Delete);
    assert_eq!(world.settle(0), Ok(0));
}

/// Each guard, taken out, is missed.
#[test]
fn no_guard_is_there_for_nothing() {
    let moves = Budget { wants: 2, kills: 1, aborts: 1, mounts: 2, writes: 2, ..Budget::default() };
    let cut = Budget { wants: 1, cuts: 1, mounts: 1, writes: 1, ..Budget::default() };
    let deletion = Budget { wants: 1, deletes: 1, kills: 1, ..Budget::default() };
    let shared = Budget { wants: 1, aborts: 1, snapshots: 1, drops: 1, ..Budget::default() };
    let again = Budget { wants: 2, ..shared };
    for (weakness, budget) in [
        (Weakness::StaleWrites, moves),
        (Weakness::BlindToMounts, moves),
        (Weakness::StaysWritable, moves),
        (Weakness::KeepsCutStreams, moves),
        (Weakness::MountsAnywhere, moves),
        (Weakness::RestsForEver, moves),
        (Weakness::ForgetsLogs, cut),
        (Weakness::ForgetsFirst, deletion),
        (Weakness::DestroysShared, shared),
        (Weakness::DestroysComing, shared),
        (Weakness::SendsAgain, again),
    ] {
        let (states, found) = check(2, budget, weakness);
        println!("{weakness:?}: {states} states, {found:?}");
        assert!(!found.is_empty(), "{weakness:?} was not noticed in {states} states");
    }
}
