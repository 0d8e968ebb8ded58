//! Making entries what is wanted, in parts, and knowing at each moment what there are.

use std::{collections::BTreeMap, io, net::IpAddr};

use super::{Change, Forwarding, Table, batch::BATCH, difference, kernel::Kernel, plan};
use crate::{
    Dataplane, Mac,
    error::{Error, Result},
};

/// What changes entries: the kernel, or what stands for it in tests.
pub(super) trait Entries {
    /// Tries all of these changes, in their order. Returns the error numbers of those that were refused, by their position.
    ///
    /// # Errors
    /// When it isn't known which of them were made.
    fn change(&mut self, changes: &[Change]) -> io::Result<Vec<(usize, i32)>>;
}

/// The entries that a network has as far as that is known, from one time to the next.
#[derive(Debug, Default)]
pub struct Known(Option<Table>);

impl Known {
    /// Somebody else changed what there is of an address and its MAC: a port is gone that had them. Whatever is wanted of them is done anew.
    pub fn forget(&mut self, address: IpAddr, mac: Mac) {
        if let Some(table) = &mut self.0 {
            table.doubted.insert(mac);
            // Nobody's MAC.
            table.neighbours.insert(address, Mac::default());
        }
    }
}

/// Makes a network's forwarding what is wanted. It holds the network's namespace alive.
pub struct Forwarder {
    place: String,
    /// None if the kernel's answers were lost.
    following: Option<Following<Kernel>>,
}

impl Dataplane {
    /// Makes a network's forwarding what is wanted, all at once; returns how many entries had to be changed.
    ///
    /// # Errors
    /// What the kernel refuses; all other entries are in place.
    pub async fn forward(&self, vni: u32, wanted: &Forwarding) -> Result<usize> {
        let mut forwarder = self.forwarder(vni, Known::default()).await?;
        let (mut changes, mut count) = (forwarder.changes(wanted), 0);
        while !changes.is_empty() {
            count += changes.len();
            forwarder.apply(changes).await?;
            changes = forwarder.again(wanted);
        }
        forwarder.finish().1.map(|()| count)
    }

    /// Begins to make a network's forwarding something else. The kernel is asked what there is only if that isn't known.
    ///
    /// # Errors
    /// When the network isn't set up here, or the kernel doesn't tell.
    pub async fn forwarder(&self, vni: u32, known: Known) -> Result<Forwarder> {
        let namespace = self.namespace(vni)?;
        let kernel = Kernel::open(&namespace).await?;
        let known = match known.0 {
            Some(table) => table,
            None => kernel.read(&namespace).await?,
        };
        let place = namespace.path().display().to_string();
        Ok(Forwarder { place, following: Some(Following::new(kernel, known)) })
    }
}

impl Forwarder {
    /// What takes the entries from what they are to what is wanted.
    pub fn changes(&self, wanted: &Forwarding) -> Vec<Change> {
        self.following.as_ref().map(|following| plan(&following.known, &wanted.wanted())).unwrap_or_default()
    }

    /// The same where `before` is what was wanted last, and all of it is so: as much work as what has changed.
    pub fn changes_since(&self, before: &Forwarding, wanted: &Forwarding) -> Vec<Change> {
        let following = self.following.as_ref();
        following.map(|following| difference::changes(&following.known, before, wanted)).unwrap_or_default()
    }

    /// What was refused, if there may be room for it by now: entries are added first and removed last.
    pub fn again(&mut self, wanted: &Forwarding) -> Vec<Change> {
        let Some(following) = &mut self.following else { return Vec::new() };
        if following.may_try_again() { plan(&following.known, &wanted.wanted()) } else { Vec::new() }
    }

    /// Makes changes, and tries all of them. Which are refused [`Self::finish`] tells.
    ///
    /// # Errors
    /// When it isn't known any more what the kernel has.
    pub async fn apply(&mut self, changes: Vec<Change>) -> Result<()> {
        let fail =
            |source| Error::Netlink { action: "change forwarding entries".into(), place: self.place.clone(), source };
        let Some(mut following) = self.following.take() else { return Err(fail(io::ErrorKind::BrokenPipe.into())) };
        let made = tokio::task::spawn_blocking(move || following.apply(&changes).map(|()| following)).await;
        self.following = Some(made.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(fail)?);
        Ok(())
    }

    /// What there is now; and the first of the changes that were refused as an error.
    pub fn finish(self) -> (Known, Result<()>) {
        let Some(Following { known, refused, .. }) = self.following else { return (Known(None), Ok(())) };
        let refused = refused.map_or(Ok(()), |Refused { first, errno, others }| {
            let source = io::Error::from_raw_os_error(errno);
            Err(Error::Entry { action: first.to_string(), place: self.place, source, others })
        });
        (Known(Some(known)), refused)
    }
}

struct Following<E> {
    entries: E,
    known: Table,
    refused: Option<Refused>,
    /// Whether something was removed, too.
    made_room: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Refused {
    first: Change,
    errno: i32,
    others: usize,
}

impl<E: Entries> Following<E> {
    fn new(entries: E, known: Table) -> Self {
        Self { entries, known, refused: None, made_room: false }
    }

    /// Whether something was refused, and something was removed. Then it wasn't refused yet.
    fn may_try_again(&mut self) -> bool {
        let has_room = std::mem::take(&mut self.made_room) && self.refused.is_some();
        if has_room {
            self.refused = None;
        }
        has_room
    }

    fn apply(&mut self, changes: &[Change]) -> io::Result<()> {
        for some in changes.chunks(BATCH) {
            let refused: BTreeMap<usize, i32> = self.entries.change(some)?.into_iter().collect();
            for (position, change) in some.iter().enumerate() {
                match (refused.get(&position), &mut self.refused) {
                    (None, _) => {
                        self.made_room |= change.is_removal();
                        self.known.follow(*change);
                    }
                    (Some(_), Some(refused)) => refused.others += 1,
                    (Some(errno), none) => *none = Some(Refused { first: *change, errno: *errno, others: 0 }),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Here, Peer};

    /// Entries in memory that do what they are told, but for what goes wrong.
    #[derive(Default)]
    struct Faulty {
        table: Table,
        /// Positions, counted over all changes, that are refused.
        refuses: Vec<usize>,
        /// At this one the answers are lost; those before it are made.
        loses: Option<usize>,
        seen: usize,
    }

    impl Entries for Faulty {
        fn change(&mut self, changes: &[Change]) -> io::Result<Vec<(usize, i32)>> {
            let mut refused = Vec::new();
            for (position, change) in changes.iter().enumerate() {
                let number = self.seen;
                self.seen += 1;
                if self.loses == Some(number) {
                    return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
                }
                match self.refuses.contains(&number) {
                    true => refused.push((position, libc::ENOSPC)),
                    false => self.table.follow(*change),
                }
            }
            Ok(refused)
        }
    }

    fn wanted(peers: u8, endpoints: u8) -> Forwarding {
        let endpoint = |peer: u8, last| (IpAddr::from([10, 32, peer, last]), Mac([2, 0, 0, 0, peer, last]));
        let peer = |number| Peer {
            vtep: IpAddr::from([192, 0, 2, number]),
            endpoints: (0..endpoints).map(|last| endpoint(number, last)).collect(),
        };
        Forwarding { local: vec![endpoint(0, 1)], peers: (1..=peers).map(peer).collect(), suppression: true }
    }

    fn following(entries: Faulty) -> Following<Faulty> {
        Following::new(entries, Table::default())
    }

    #[test]
    fn what_is_refused_is_told_and_the_rest_is_made() {
        let wanted = wanted(3, 100).wanted();
        let changes = plan(&Table::default(), &wanted);
        let refuses = vec![5, BATCH - 1, BATCH, changes.len() - 1];
        let mut following = following(Faulty { refuses: refuses.clone(), ..Faulty::default() });
        following.apply(&changes).unwrap();
        assert_eq!(following.refused, Some(Refused { first: changes[5], errno: libc::ENOSPC, others: 3 }));
        assert_eq!(following.known, following.entries.table, "what is known is what there is");
        let left: Vec<Change> = refuses.iter().map(|number| changes[*number]).collect();
        let again = plan(&following.known, &wanted);
        assert_eq!(again, left, "and no more is left to do");
        following.apply(&again).unwrap();
        assert_eq!(following.entries.table, wanted);
    }

    #[test]
    fn what_is_refused_is_tried_again_once_there_is_room() {
        let mut following = following(Faulty::default());
        following.apply(&plan(&Table::default(), &wanted(1, 10).wanted())).unwrap();
        assert!(!following.may_try_again(), "nothing was refused");
        following.entries.refuses = vec![following.entries.seen];
        let other = wanted(2, 3).wanted();
        following.apply(&plan(&following.known, &other)).unwrap();
        assert!(following.refused.is_some() && following.may_try_again());
        let rest = plan(&following.known, &other);
        following.entries.refuses = vec![following.entries.seen];
        following.apply(&rest).unwrap();
        assert!(rest.len() == 1 && following.refused.is_some() && !following.may_try_again(), "not for ever");
    }

    #[test]
    fn lost_answers_are_no_knowledge() {
        let changes = plan(&Table::default(), &wanted(3, 100).wanted());
        for loses in [0, 7, BATCH, BATCH + 1, changes.len() - 1] {
            let mut following = following(Faulty { loses: Some(loses), ..Faulty::default() });
            assert_eq!(following.apply(&changes).unwrap_err().raw_os_error(), Some(libc::ENOBUFS));
            // Asked for, what there is takes it from there.
            following.known = following.entries.table.clone();
            let rest = plan(&following.known, &wanted(3, 100).wanted());
            assert_eq!(rest.len(), changes.len() - loses);
            following.apply(&rest).unwrap();
            assert_eq!(following.entries.table, wanted(3, 100).wanted());
        }
    }

    #[test]
    fn a_change_of_one_endpoint_is_as_much_work_as_it_changes() {
        let mut following = following(Faulty::default());
        let before = wanted(200, 100);
        following.apply(&plan(&Table::default(), &before.wanted())).unwrap();
        let mut after = before.clone();
        let gone = after.peers[77].endpoints.pop().unwrap();
        let vtep = after.peers[77].vtep;
        assert_eq!(
            plan(&following.known, &after.wanted()),
            [Change::RemoveBehind(gone.1), Change::RemoveTunnel(gone.1, vtep), Change::RemoveNeighbour(gone.0)]
        );
    }

    #[test]
    fn what_was_a_ports_is_done_anew() {
        let before = wanted(1, 2).wanted();
        let (address, mac) = wanted(1, 2).peers[0].endpoints[0];
        for (wanted, expected) in [
            (wanted(1, 2), vec![Change::AddBehind(mac), Change::SetNeighbour(address, mac)]),
            // All of it goes, be it there or not.
            (wanted(0, 0), plan(&before, &wanted(0, 0).wanted())),
        ] {
            let mut known = Known(Some(before.clone()));
            known.forget(address, mac);
            let mut table = known.0.unwrap();
            let changes = plan(&table, &wanted.wanted());
            assert_eq!(changes, expected);
            changes.into_iter().for_each(|change| table.follow(change));
            assert_eq!(table, wanted.wanted(), "and then it is known");
        }
        // Of what nobody knew there may be something, too.
        let mut known = Known(Some(wanted(0, 0).wanted()));
        known.forget(address, mac);
        let changes = plan(&known.0.unwrap(), &wanted(0, 0).wanted());
        assert_eq!(changes, [Change::RemoveBehind(mac), Change::RemoveNeighbour(address)]);
    }

    #[test]
    fn what_came_here_meanwhile_is_not_sent_away() {
        let (address, mac, other) = (IpAddr::from([10, 32, 0, 5]), Mac([2, 0, 0, 0, 0, 5]), Mac([2, 0, 0, 0, 0, 6]));
        let vtep = IpAddr::from([192, 0, 2, 2]);
        let here = Here::from_iter([(address, mac)]);
        let against = [
            Change::SetTunnel(mac, vtep),
            Change::AddBehind(mac),
            Change::SetNeighbour(address, other),
            Change::RemoveNeighbour(address),
        ];
        assert!(against.iter().all(|change| change.is_against(&here)));
        let with = [
            Change::SetTunnel(other, vtep),
            Change::RemoveTunnel(mac, vtep),
            Change::RemoveBehind(mac),
            Change::SetNeighbour(address, mac),
        ];
        assert!(!with.iter().any(|change| change.is_against(&here)));
    }
}
