//! Which network has which VNI. Pure.

use std::collections::BTreeMap;

use kube::ResourceExt;
use portolan_crds::ContainerNetwork;

use super::validate::Refusal;

/// The lowest VNI that is given out: lower ones are left to those who number by hand.
pub const FIRST: u32 = 4096;
/// The highest VNI (24 bits, RFC 7348).
const LAST: u32 = 0xff_ffff;

/// Gives each of `networks` its VNI, by name. One that a network has (`status.vni`) stays; among rivals the older wins.
///
/// `plugged` tells how many pods are plugged into a network: while there are any, its VNI can't change.
pub fn assign(
    networks: &[ContainerNetwork],
    plugged: impl Fn(&str) -> usize,
) -> BTreeMap<String, Result<u32, Refusal>> {
    let mut by_age: Vec<&ContainerNetwork> = networks.iter().collect();
    by_age.sort_by_key(|network| (network.metadata.creation_timestamp.clone(), network.name_any()));
    let held = |network: &ContainerNetwork| network.status.as_ref().and_then(|status| status.vni);
    let keeps = |network: &ContainerNetwork| match (held(network), network.spec.vni) {
        (Some(held), Some(wanted)) if held != wanted => plugged(&network.name_any()) > 0,
        (held, _) => held.is_some(),
    };

    let mut users: BTreeMap<u32, String> = BTreeMap::new();
    let mut result = BTreeMap::new();
    let (keeping, asking): (Vec<_>, Vec<_>) = by_age.into_iter().partition(|network| keeps(network));
    let (giving, open): (Vec<_>, Vec<_>) = asking.into_iter().partition(|network| network.spec.vni.is_some());
    for network in keeping {
        let name = network.name_any();
        let Some(vni) = held(network) else { continue };
        let mut outcome = claim(&mut users, vni, &name);
        if let Some(wanted) = network.spec.vni.filter(|wanted| *wanted != vni) {
            outcome = Err(changed(wanted, vni, plugged(&name)));
        }
        result.insert(name, outcome);
    }
    for network in giving {
        let name = network.name_any();
        let Some(vni) = network.spec.vni else { continue };
        result.insert(name.clone(), claim(&mut users, vni, &name));
    }
    for network in open {
        let name = network.name_any();
        let outcome = match (FIRST..=LAST).find(|vni| !users.contains_key(vni)) {
            Some(vni) => claim(&mut users, vni, &name),
            None => Err(Refusal {
                reason: "NoFreeVNI",
                message: format!("no VNI from {FIRST} to {LAST} is free: delete a network, or give a lower vni"),
            }),
        };
        result.insert(name, outcome);
    }
    result
}

fn claim(users: &mut BTreeMap<u32, String>, vni: u32, name: &str) -> Result<u32, Refusal> {
    if let Some(user) = users.get(&vni) {
        let message =
            format!("vni {vni} is in use by ContainerNetwork {user}: give another, or none to have one chosen");
        return Err(Refusal { reason: "VNIInUse", message });
    }
    users.insert(vni, name.to_owned());
    Ok(vni)
}

fn changed(wanted: u32, held: u32, pods: usize) -> Refusal {
    let message = format!(
        "vni can't change from {held} to {wanted} while {pods} pods are plugged in: delete them, or set vni back to {held}"
    );
    Refusal { reason: "VNIChanged", message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::{ContainerNetworkSpec, ContainerNetworkStatus};

    fn network(name: &str, given: Option<u32>, held: Option<u32>) -> ContainerNetwork {
        let mut network = ContainerNetwork::new(name, ContainerNetworkSpec { vni: given, ..Default::default() });
        network.status = held.map(|vni| ContainerNetworkStatus { vni: Some(vni), ..Default::default() });
        network
    }

    fn reason(outcome: &Result<u32, Refusal>) -> &'static str {
        outcome.as_ref().err().map_or("", |refusal| refusal.reason)
    }

    #[test]
    fn the_lowest_free_one_is_given_out() {
        let all = [network("a", None, None), network("b", None, Some(4096)), network("c", Some(4097), None)];
        let vnis = assign(&all, |_| 0);
        assert_eq!(vnis["a"], Ok(4098));
        assert_eq!(vnis["b"], Ok(4096));
        assert_eq!(vnis["c"], Ok(4097));
    }

    #[test]
    fn who_has_it_keeps_it() {
        let all = [network("a", Some(5000), None), network("b", None, Some(5000))];
        let vnis = assign(&all, |_| 0);
        assert_eq!(vnis["b"], Ok(5000));
        assert_eq!(reason(&vnis["a"]), "VNIInUse");
        assert!(vnis["a"].as_ref().unwrap_err().message.contains("ContainerNetwork b"));
    }

    #[test]
    fn a_change_waits_until_no_pod_is_plugged_in() {
        let all = [network("a", Some(5000), Some(4096))];
        assert_eq!(reason(&assign(&all, |_| 2)["a"]), "VNIChanged");
        assert_eq!(assign(&all, |_| 0)["a"], Ok(5000));
    }
}
