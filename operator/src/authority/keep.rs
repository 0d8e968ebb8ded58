//! The authority's Secret and ConfigMap.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use portolan_crds::{CA_CONFIG_MAP, CA_SECRET};
use serde_json::json;

use super::issue::{Authority, AuthorityError, Pem};

const CERTIFICATE_KEY: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";
const PUBLISHED_KEY: &str = "ca.crt";

/// The authority can't be had.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// An object could not be read or written.
    #[error("can't {verb} {object}")]
    Api {
        /// What was tried.
        verb: &'static str,
        /// On what.
        object: String,
        /// Why.
        source: kube::Error,
    },
    /// The Secret lacks a key: nothing is put over what may be somebody's.
    #[error("Secret {secret} has no {key}: restore it, or delete the Secret to have a new authority made")]
    Incomplete {
        /// Namespace and name.
        secret: String,
        /// The missing key.
        key: &'static str,
    },
    /// The key or the certificate is unusable.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// The authority of this namespace. Made if there is none yet; of several processes that start at once, one's is taken by all.
///
/// # Errors
/// When the Secret can't be read or made, or holds no usable authority.
pub async fn load_or_create(client: &Client, namespace: &str) -> Result<Authority, KeepError> {
    let secrets = Api::<Secret>::namespaced(client.clone(), namespace);
    let failed =
        |verb| move |source| KeepError::Api { verb, object: format!("Secret {namespace}/{CA_SECRET}"), source };
    let secret = match secrets.get_opt(CA_SECRET).await.map_err(failed("read"))? {
        Some(secret) => secret,
        None => match secrets.create(&PostParams::default(), &new_secret()?).await {
            Ok(secret) => {
                tracing::info!(namespace, secret = CA_SECRET, "made a new certificate authority");
                secret
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                secrets.get(CA_SECRET).await.map_err(failed("read"))?
            }
            Err(error) => return Err(failed("create")(error)),
        },
    };
    let authority = Authority::load(&pem_of(&secret, namespace)?)?;
    publish(client, namespace, authority.certificate()).await?;
    Ok(authority)
}

fn new_secret() -> Result<Secret, AuthorityError> {
    let pem = Authority::generate(jiff::Timestamp::now())?;
    let data = [(CERTIFICATE_KEY, pem.certificate), (PRIVATE_KEY, pem.key)];
    Ok(Secret {
        metadata: ObjectMeta { name: Some(CA_SECRET.to_owned()), ..ObjectMeta::default() },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data.into_iter().map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect()),
        ..Secret::default()
    })
}

fn pem_of(secret: &Secret, namespace: &str) -> Result<Pem, KeepError> {
    let text = |key: &'static str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.clone());
        bytes
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| KeepError::Incomplete { secret: format!("{namespace}/{CA_SECRET}"), key })
    };
    Ok(Pem { certificate: text(CERTIFICATE_KEY)?, key: text(PRIVATE_KEY)? })
}

/// Puts the certificate where node agents find it. The Secret is the truth: a ConfigMap that says otherwise is corrected.
pub(super) async fn publish(client: &Client, namespace: &str, certificate: &str) -> Result<(), KeepError> {
    let config_maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let failed =
        |verb| move |source| KeepError::Api { verb, object: format!("ConfigMap {namespace}/{CA_CONFIG_MAP}"), source };
    let data = BTreeMap::from([(PUBLISHED_KEY.to_owned(), certificate.to_owned())]);
    match config_maps.get_opt(CA_CONFIG_MAP).await.map_err(failed("read"))? {
        Some(present) if present.data.as_ref() == Some(&data) => return Ok(()),
        Some(_) => {}
        None => {
            let metadata = ObjectMeta { name: Some(CA_CONFIG_MAP.to_owned()), ..ObjectMeta::default() };
            let wanted = ConfigMap { metadata, data: Some(data.clone()), ..ConfigMap::default() };
            match config_maps.create(&PostParams::default(), &wanted).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(status)) if status.is_already_exists() => {}
                Err(error) => return Err(failed("create")(error)),
            }
        }
    }
    let patch = Patch::Merge(json!({"data": data}));
    config_maps.patch(CA_CONFIG_MAP, &PatchParams::default(), &patch).await.map_err(failed("correct"))?;
    Ok(())
}
