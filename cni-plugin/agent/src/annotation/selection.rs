//! The annotation as a list of JSON objects: network selection elements of the Network Plumbing Working Group's de-facto standard
//! (multi-net-spec, version 1.3, section 4.1.2).

mod bandwidth;

use std::net::IpAddr;

use portolan_net::{BRIDGE_MAC, Bandwidth, Mac};
use serde_json::{Map, Value};

use super::{AnnotationError, Wish, default_interface, is_interface_name, is_network_name, refuse};

/// Fields of the standard that have no meaning here, or not yet.
const FIELDS: &str = "the fields name, interface, ips, mac, bandwidth and default-route";

/// Reads a list of selections.
pub(super) fn parse(text: &str) -> Result<Vec<Wish>, AnnotationError> {
    let list: Vec<Map<String, Value>> = serde_json::from_str(text).map_err(|_| {
        refuse(
            text,
            "a JSON list of objects, such as [{\"name\":\"backend\",\"interface\":\"eth2\",\"ips\":[\"10.32.0.7\"]}]",
        )
    })?;
    if list.is_empty() {
        return Err(refuse(text, "at least one network"));
    }
    list.iter().enumerate().map(|(position, object)| selection(position, object)).collect()
}

fn selection(position: usize, object: &Map<String, Value>) -> Result<Wish, AnnotationError> {
    let (mut network, mut interface) = (None, default_interface(position));
    let (mut addresses, mut mac, mut limits, mut gateways) = (Vec::new(), None, Bandwidth::default(), Vec::new());
    for (field, value) in object {
        let wrong = |allowed| refuse(&format!("{field}: {value}"), allowed);
        match field.as_str() {
            "name" => {
                let name = value.as_str().filter(|name| is_network_name(name));
                network = Some(name.ok_or_else(|| wrong("the name of a ContainerNetwork"))?.to_owned());
            }
            "interface" => {
                let name = value.as_str().filter(|name| is_interface_name(name));
                let allowed = "1 to 15 letters, digits, '_', '.' or '-', neither eth0 nor lo";
                interface = name.ok_or_else(|| wrong(allowed))?.to_owned();
            }
            "ips" => {
                let allowed = "a list of at most one address of each family, without a prefix length";
                addresses = ips(value).ok_or_else(|| wrong(allowed))?;
            }
            "mac" => {
                let given = value.as_str().and_then(|text| text.parse().ok()).filter(is_local);
                let allowed = "a locally administered MAC of one interface, such as 06:00:00:00:00:07 (its first byte ends in 2, 6, a or e)";
                mac = Some(given.ok_or_else(|| wrong(allowed))?);
            }
            "default-route" => {
                let allowed = "a list of at most one address of each family, without a prefix length";
                gateways = ips(value).ok_or_else(|| wrong(allowed))?;
            }
            "bandwidth" => limits = bandwidth::parse(value)?,
            _ => return Err(wrong(FIELDS)),
        }
    }
    let unnamed = || refuse(&Value::Object(object.clone()).to_string(), "an object with the field name");
    let named = object.contains_key("interface");
    let network = network.ok_or_else(unnamed)?;
    Ok(Wish { network, interface, named, addresses, mac, bandwidth: limits, gateways })
}

fn ips(value: &Value) -> Option<Vec<IpAddr>> {
    let texts = value.as_array()?.iter().map(|it| it.as_str()?.parse::<IpAddr>().ok());
    let addresses: Vec<IpAddr> = texts.collect::<Option<_>>()?;
    let of_family = |is_ipv4| addresses.iter().filter(|address| address.is_ipv4() == is_ipv4).count();
    (of_family(true) <= 1 && of_family(false) <= 1).then_some(addresses)
}

/// Whether a MAC is nobody's but ours to give, and a single interface's (IEEE 802, section 8.2).
fn is_local(mac: &Mac) -> bool {
    mac.0[0] & 3 == 2 && *mac != BRIDGE_MAC
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    #[test]
    fn what_is_understood() {
        let text = r#" [{"name":"backend","interface":"db0","ips":["10.32.0.7","fd32::7"],"mac":"06:00:00:00:00:07"},{"name":"frontend","default-route":["10.33.0.1","fd33::1"]}]"#;
        let wishes = parse(text).unwrap();
        let (backend, frontend) = (&wishes[0], &wishes[1]);
        assert_eq!((&*backend.network, &*backend.interface), ("backend", "db0"));
        assert_eq!(backend.addresses, ["10.32.0.7", "fd32::7"].map(|it| it.parse::<std::net::IpAddr>().unwrap()));
        assert_eq!(backend.mac.unwrap().to_string(), "06:00:00:00:00:07");
        assert_eq!((&*frontend.network, &*frontend.interface), ("frontend", "eth2"));
        assert_eq!(frontend.gateways, ["10.33.0.1", "fd33::1"].map(|it| it.parse::<std::net::IpAddr>().unwrap()));
        assert!(backend.gateways.is_empty());
        assert!(frontend.addresses.is_empty() && frontend.mac.is_none());
    }

    #[test]
    fn what_is_refused_and_why() {
        let cases = [
            ("[", "\"[\" was given; allowed: a JSON list"),
            ("[]", "at least one network"),
            (r#"["backend"]"#, "a JSON list of objects"),
            (r#"[{"interface":"eth1"}]"#, "an object with the field name"),
            (r#"[{"name":"Backend"}]"#, "the name of a ContainerNetwork"),
            (r#"[{"name":7}]"#, "the name of a ContainerNetwork"),
            (r#"[{"name":"a","interface":"eth0"}]"#, "neither eth0"),
            (r#"[{"name":"a","ips":"10.32.0.7"}]"#, "at most one address of each family"),
            (r#"[{"name":"a","ips":["10.32.0.7/24"]}]"#, "without a prefix length"),
            (r#"[{"name":"a","ips":["10.32.0.7","10.32.0.8"]}]"#, "at most one address of each family"),
            (r#"[{"name":"a","mac":"00:00:00:00:00:07"}]"#, "locally administered"),
            (r#"[{"name":"a","mac":"03:00:00:00:00:07"}]"#, "locally administered"),
            (r#"[{"name":"a","mac":"02:50:a9:fe:35:35"}]"#, "locally administered"),
            (r#"[{"name":"a","mac":"7"}]"#, "locally administered"),
            (r#"[{"name":"a","default-route":"10.32.0.1"}]"#, "at most one address of each family"),
            (r#"[{"name":"a","default-route":["10.32.0.1","10.32.0.2"]}]"#, "at most one address of each family"),
            (
                r#"[{"name":"a","default-route":["10.32.0.1"]},{"name":"b","default-route":["10.33.0.1"]}]"#,
                "one default-route of each family",
            ),
            (
                r#"[{"name":"a","portMappings":[]}]"#,
                "the fields name, interface, ips, mac, bandwidth and default-route",
            ),
            (r#"[{"name":"a","namespace":"shop"}]"#, "namespace: "),
            (r#"[{"name":"a"},{"name":"a"}]"#, "each network once"),
            (r#"[{"name":"a","interface":"eth2"},{"name":"b"}]"#, "each interface once"),
        ];
        for (text, named) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("annotation portolan.dev/networks: "), "{error}");
            // The given text is shown as a string of Rust.
            assert!(error.contains(named), "{text}: {error} should say {named}");
        }
        let many: Vec<String> = (0..17).map(|n| format!(r#"{{"name":"n{n}"}}"#)).collect();
        assert!(parse(&format!("[{}]", many.join(","))).unwrap_err().to_string().contains("at most 16"));
    }
}
