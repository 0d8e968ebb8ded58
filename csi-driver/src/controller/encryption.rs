//! Which Secret an encrypted volume's key is in, and what an encrypted volume may begin as. The Secret itself is never read here: the
//! kubelet gives it to the node where a pod uses the volume.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use portolan_crds::{KeySecret, PortableVolume, VolumeEncryption, VolumeSource};

use super::Hub;
use crate::parameters::Refusal;

/// The parameters that name the Secret; every CSI driver has them (kubernetes-csi.github.io, "StorageClass Secrets").
const SECRET_NAME: &str = "csi.storage.k8s.io/node-stage-secret-name";
const SECRET_NAMESPACE: &str = "csi.storage.k8s.io/node-stage-secret-namespace";

/// What the words in a Secret's name stand for.
struct Words<'a> {
    claim: &'a PersistentVolumeClaim,
    /// The name of the PersistentVolume.
    pv: &'a str,
}

/// The Secret that a class's parameters name for a claim's volume.
///
/// # Errors
/// When one of the two parameters is missing, has an unknown word, or can't be the name of a Secret or a namespace.
pub(super) fn secret(
    parameters: &BTreeMap<String, String>,
    claim: &PersistentVolumeClaim,
    pv: &str,
) -> Result<KeySecret, Refusal> {
    let words = Words { claim, pv };
    let given = |name| parameters.get(name).ok_or(Refusal::NoSecret { missing: name });
    let (name, namespace) = (given(SECRET_NAME)?, given(SECRET_NAMESPACE)?);
    let of_name = |word: &str| words.of_claim(word).or_else(|| words.of_both(word));
    let allowed_in_name = "${pv.name}, ${pvc.namespace}, ${pvc.name} and ${pvc.annotations['<annotation>']}";
    Ok(KeySecret {
        name: resolve(SECRET_NAME, name, 253, allowed_in_name, of_name)?,
        namespace: resolve(SECRET_NAMESPACE, namespace, 63, "${pv.name} and ${pvc.namespace}", |word| {
            words.of_both(word)
        })?,
    })
}

impl Words<'_> {
    fn of_both(&self, word: &str) -> Option<String> {
        match word {
            "pv.name" => Some(self.pv.to_owned()),
            "pvc.namespace" => self.claim.namespace(),
            _ => None,
        }
    }

    fn of_claim(&self, word: &str) -> Option<String> {
        match word {
            "pvc.name" => Some(self.claim.name_any()),
            _ => {
                let annotation = word.strip_prefix("pvc.annotations['")?.strip_suffix("']")?;
                // An annotation that isn't there leaves a name that says so by being none.
                Some(self.claim.annotations().get(annotation).cloned().unwrap_or_default())
            }
        }
    }
}

/// A name with its words (`${...}`) replaced; at most so many characters, of those that DNS names have.
fn resolve(
    parameter: &'static str,
    given: &str,
    longest: usize,
    allowed: &str,
    word: impl Fn(&str) -> Option<String>,
) -> Result<String, Refusal> {
    let refuse = |why: String| Refusal::Secret { name: parameter, given: given.to_owned(), why };
    let (mut name, mut rest) = (String::new(), given);
    while let Some((before, after)) = rest.split_once("${") {
        let (inner, after) = after
            .split_once('}')
            .ok_or_else(|| refuse("a ${ has no }: allowed are ${...} and plain text".to_owned()))?;
        let stands_for =
            word(inner).ok_or_else(|| refuse(format!("${{{inner}}} is unknown: allowed are {allowed}")))?;
        name.push_str(before);
        name.push_str(&stands_for);
        rest = after;
    }
    name.push_str(rest);
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = name.bytes().all(|byte| plain(byte) || matches!(byte, b'-' | b'.'))
        && name.bytes().next().is_some_and(plain)
        && name.bytes().last().is_some_and(plain)
        && name.len() <= longest;
    match good {
        true => Ok(name),
        false => {
            Err(refuse(format!("that is {name:?} for this claim: allowed is the name of an object of Kubernetes")))
        }
    }
}

/// Why a volume that is encrypted as `wanted` can't begin as `source`, if it can't: it has its source's key, or none as its source has.
pub(super) async fn check_source(
    hub: &Hub,
    source: &VolumeSource,
    wanted: Option<&VolumeEncryption>,
) -> kube::Result<Option<String>> {
    let of = hub.volumes.get_opt(&source.volume).await?;
    Ok(of.and_then(|of| differs(&of, wanted)))
}

fn differs(of: &PortableVolume, wanted: Option<&VolumeEncryption>) -> Option<String> {
    let name = of.name_any();
    match (&of.spec.encryption, wanted) {
        (None, None) => None,
        (None, Some(_)) => Some(format!(
            "volume {name} is not encrypted, and neither can be what begins as it: allowed is a class without parameter encryption"
        )),
        (Some(has), None) => Some(format!(
            "volume {name} is encrypted, and so must be what begins as it: allowed is a class with encryption {}{}",
            has.cipher.as_str(),
            and_secret(has)
        )),
        (Some(has), Some(wanted)) if has.cipher != wanted.cipher => Some(format!(
            "volume {name} is encrypted with {}, and this class says {}: allowed is the same",
            has.cipher.as_str(),
            wanted.cipher.as_str()
        )),
        (Some(has), Some(wanted)) => match (&has.secret, &wanted.secret) {
            (Some(has), Some(wanted)) if has != wanted => Some(format!(
                "volume {name} has its key from Secret {has}, and this class says {wanted}: allowed is the same, as what begins \
                 as it has its key"
            )),
            _ => None,
        },
    }
}

fn and_secret(has: &VolumeEncryption) -> String {
    has.secret.as_ref().map(|secret| format!(" and Secret {secret}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Cipher, PortableVolumeSpec};
    use serde_json::json;

    use super::*;

    fn resolved(name: &str, namespace: &str) -> Result<String, String> {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": { "name": "db", "namespace": "shop", "annotations": { "acme.example/key": "gold" } },
        }))
        .unwrap();
        let parameters = [(SECRET_NAME, name), (SECRET_NAMESPACE, namespace)];
        let parameters = parameters.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        secret(&parameters, &claim, "pvc-1").map(|secret| secret.to_string()).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn names_of_secrets() {
        for (name, namespace, wanted) in [
            ("keys", "vault", "vault/keys"),
            ("${pvc.name}-key", "${pvc.namespace}", "shop/db-key"),
            ("${pvc.namespace}.${pvc.name}.${pv.name}", "vault", "vault/shop.db.pvc-1"),
            ("${pvc.annotations['acme.example/key']}", "${pvc.namespace}", "shop/gold"),
        ] {
            assert_eq!(resolved(name, namespace), Ok(wanted.to_owned()));
        }
        for (name, namespace, says) in [
            ("${pod.name}", "vault", "${pod.name} is unknown: allowed are ${pv.name}"),
            ("keys", "${pvc.name}", "${pvc.name} is unknown: allowed are ${pv.name} and ${pvc.namespace}"),
            ("keys", "${pvc.annotations['acme.example/key']}", "node-stage-secret-namespace"),
            ("${pvc.annotations['missing']}", "vault", "\"\" for this claim"),
            ("${pvc.name", "vault", "no }"),
            ("Keys", "vault", "node-stage-secret-name"),
            ("../keys", "vault", "\"../keys\" for this claim"),
            ("keys", "va/ult", "node-stage-secret-namespace"),
        ] {
            let refused = resolved(name, namespace).unwrap_err();
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn a_secret_must_be_named() {
        let claim = PersistentVolumeClaim::default();
        let named = |key: &str| BTreeMap::from([(key.to_owned(), "x".to_owned())]);
        let refused = |parameters| secret(&parameters, &claim, "pvc-1").unwrap_err().to_string();
        assert!(refused(named(SECRET_NAME)).contains(SECRET_NAMESPACE));
        assert!(refused(named(SECRET_NAMESPACE)).contains(SECRET_NAME));
    }

    #[test]
    fn a_copy_is_sealed_as_its_source() {
        let with = |cipher, secret: Option<&str>| VolumeEncryption {
            cipher,
            secret: secret.map(|name| KeySecret { namespace: "vault".into(), name: name.into() }),
        };
        let says = |has: Option<VolumeEncryption>, wanted: Option<VolumeEncryption>| {
            let spec = PortableVolumeSpec { encryption: has, ..PortableVolumeSpec::default() };
            differs(&PortableVolume::new("pvc-1", spec), wanted.as_ref())
        };
        let gold = with(Cipher::Aes256Gcm, Some("gold"));
        assert_eq!(says(None, None), None);
        assert_eq!(says(Some(gold.clone()), Some(gold.clone())), None);
        assert_eq!(says(Some(gold.clone()), Some(with(Cipher::Aes256Gcm, None))), None, "a CSI call names no Secret");
        for (has, wanted, word) in [
            (None, Some(gold.clone()), "not encrypted"),
            (Some(gold.clone()), None, "Secret vault/gold"),
            (Some(gold.clone()), Some(with(Cipher::Aes128Gcm, Some("gold"))), "aes-128-gcm"),
            (Some(gold), Some(with(Cipher::Aes256Gcm, Some("tin"))), "vault/tin"),
        ] {
            let why = says(has, wanted).unwrap();
            assert!(why.contains(word) && why.contains("pvc-1") && why.contains("allowed"), "{why}");
        }
    }
}
