//! Addresses that pods had before, for their other sandboxes.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError},
};

use ipnet::IpNet;

use super::{Addresses, Holder, Reservation, State, registry::Registry};
use crate::{alone::unknown, error::PlugError, network::Network};

impl<R: Registry> Addresses<R> {
    /// The addresses that a pod had on a network, for another sandbox of it. No other ones are given: which are free isn't known.
    ///
    /// They are no other pod's. Of this node none was given them since, as that would have been written down first; and other nodes may give
    /// those of their own blocks only, and no StatefulSet's: its claim stays as long as its pod does.
    pub async fn again(&self, network: &Network, holder: &Holder<'_>) -> Result<Reservation, PlugError> {
        let mut reservation = self.had(network, holder).await?;
        let mut state = self.state.lock().await;
        self.add_resolvers(&mut state, network, holder, &mut reservation)?;
        Ok(reservation)
    }

    /// The same without what it asks the DNS server from.
    pub(super) async fn had(&self, network: &Network, holder: &Holder<'_>) -> Result<Reservation, PlugError> {
        // Nobody chooses addresses meanwhile.
        let _state = self.state.lock().await;
        let had = self.known.had(holder.uid, &network.name).unwrap_or_default().addresses;
        let (name, reserved) = (network.name.clone(), Arc::clone(&self.reserved));
        let mut reservation = Reservation { addresses: Vec::new(), asks_from: None, network: name, reserved };
        for subnet in &network.subnets {
            let of_subnet = |all: &[IpAddr]| all.iter().copied().find(|address| subnet.contains(address));
            let address = of_subnet(&had).ok_or_else(|| unknown(&network.name, "the pod's address isn't known"))?;
            if of_subnet(holder.asked).is_some_and(|asked| asked != address) {
                return Err(unknown(&network.name, "the pod asks for another address than it had"));
            }
            if holder.stateful_set.is_none() && !self.known.has_block_of(&network.name, address) {
                return Err(unknown(&network.name, "the pod's address is of a block that was given back"));
            }
            self.refuse_others(network, address, holder)?;
            reservation.keep(address);
            reservation.addresses.push(address);
        }
        Ok(reservation)
    }

    /// What an earlier sandbox of the same pod had, if it is free.
    pub(super) fn former(&self, state: &mut State, network: &Network, subnet: IpNet, uid: &str) -> Option<IpAddr> {
        let had = self.known.had(uid, &network.name)?;
        let used = self.used(state, &network.name);
        let own = state.blocks.get(&network.name)?;
        let is_free = |address: &IpAddr| !used.contains(address) && own.iter().any(|block| block.contains(address));
        had.addresses.into_iter().find(|address| subnet.contains(address) && is_free(address))
    }

    /// Whether an address is another pod's of this node, or is about to be.
    fn refuse_others(&self, network: &Network, address: IpAddr, holder: &Holder<'_>) -> Result<(), PlugError> {
        let holders = self.journal.select(|e| e.network == network.name && e.addresses().any(|it| it == address));
        if let Some(other) = holders.iter().find(|e| e.uid != holder.uid) {
            let holder = format!("{}/{}", other.namespace, other.pod);
            return Err(PlugError::AddressInUse { network: network.name.clone(), address, holder });
        }
        let reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        if reserved.contains(&(network.name.clone(), address)) {
            return Err(unknown(&network.name, "the pod is being plugged in already"));
        }
        Ok(())
    }
}
