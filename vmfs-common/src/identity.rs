//! Who a host is: an Ed25519 key, and the [`HostId`] that follows from its public half.
//!
//! Every signature covers a label beside the message, so that one made for one purpose is worth
//! nothing for another. Randomness, files and certificates are `vmfs-net`'s business.

use std::fmt;

use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::ids::{HostId, hex_decode, hex_encode};

/// Label under which a public key is hashed to a [`HostId`].
const HOST_ID_LABEL: &str = "vmfs1/host-id";

/// What went wrong with a key or a signature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The 32 bytes are not a point of the curve, or a weak one.
    #[error("not a valid Ed25519 public key")]
    PublicKey,
    /// The bytes are not an Ed25519 private key in PKCS#8 form.
    #[error("not an Ed25519 private key in PKCS#8 form")]
    PrivateKey,
    /// The signature was made by another key, for another label, or over another message.
    #[error("the signature does not match")]
    Signature,
}

/// An Ed25519 public key, as its 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// An Ed25519 signature, as its 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signature(pub [u8; 64]);

impl PublicKey {
    /// Checks `signature` over (`label`, `msg`) with the strict rules (no malleable signature, no
    /// weak key).
    ///
    /// # Errors
    /// [`IdentityError::PublicKey`] for bytes that are no key, [`IdentityError::Signature`] otherwise.
    pub fn verify(&self, label: &str, msg: &[u8], signature: &Signature) -> Result<(), IdentityError> {
        let key = VerifyingKey::from_bytes(&self.0).map_err(|_| IdentityError::PublicKey)?;
        let sig = ed25519_dalek::Signature::from_bytes(&signature.0);
        key.verify_strict(&labelled(label, msg), &sig).map_err(|_| IdentityError::Signature)
    }

    /// The host that has this key.
    #[must_use]
    pub fn host_id(&self) -> HostId {
        host_id(self)
    }
}

/// The host that has `key`: the first 16 bytes of SHA-256(len(label) ‖ label ‖ key), the label being
/// `vmfs1/host-id` and its length one byte.
#[must_use]
pub fn host_id(key: &PublicKey) -> HostId {
    let hash = labelled(HOST_ID_LABEL, &key.0);
    let mut id = [0; HostId::LEN];
    id.copy_from_slice(&hash[..HostId::LEN]);
    HostId::from_bytes(id)
}

/// SHA-256(len(label) as one byte ‖ label ‖ msg): what is signed, and what ids are cut from.
fn labelled(label: &str, msg: &[u8]) -> [u8; 32] {
    let len = u8::try_from(label.len()).expect("invariant: labels are short literals of this program");
    let mut hash = Sha256::new();
    hash.update([len]);
    hash.update(label.as_bytes());
    hash.update(msg);
    hash.finalize().into()
}

/// A host's private key. Overwritten with zeros when dropped; never shown by `Debug`.
#[derive(Clone)]
pub struct HostKey(SigningKey);

impl HostKey {
    /// The key that follows from `seed`: 32 random bytes of the caller's.
    #[must_use]
    pub fn from_seed(seed: [u8; 32]) -> Self {
        let seed = Zeroizing::new(seed);
        Self(SigningKey::from_bytes(&seed))
    }

    /// Reads a PKCS#8 document (DER, version 1 or 2).
    ///
    /// # Errors
    /// [`IdentityError::PrivateKey`].
    pub fn from_pkcs8_der(der: &[u8]) -> Result<Self, IdentityError> {
        SigningKey::from_pkcs8_der(der).map(Self).map_err(|_| IdentityError::PrivateKey)
    }

    /// The key as PKCS#8 (DER, version 2: with the public key).
    #[must_use]
    pub fn to_pkcs8_der(&self) -> Zeroizing<Vec<u8>> {
        let doc = self.0.to_pkcs8_der().expect("invariant: 32 bytes always encode");
        Zeroizing::new(doc.as_bytes().to_vec())
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// The host that has this key.
    #[must_use]
    pub fn host_id(&self) -> HostId {
        host_id(&self.public())
    }

    /// Signs `msg` for the purpose `label` (at most 255 bytes).
    #[must_use]
    pub fn sign(&self, label: &str, msg: &[u8]) -> Signature {
        Signature(self.0.sign(&labelled(label, msg)).to_bytes())
    }
}

impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostKey(private half of {})", self.public())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex_encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex_encode(&self.0))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({})", hex_encode(&self.0[..4]))
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() { hex_array(d).map(Self) } else { <[u8; 32]>::deserialize(d).map(Self) }
    }
}

impl Serialize for Signature {
    /// Binary: 64 bytes without a length. Text: hexadecimal.
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            return s.collect_str(self);
        }
        let (mut r, mut z) = ([0; 32], [0; 32]);
        r.copy_from_slice(&self.0[..32]);
        z.copy_from_slice(&self.0[32..]);
        (r, z).serialize(s)
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            return hex_array(d).map(Self);
        }
        let (r, z) = <([u8; 32], [u8; 32])>::deserialize(d)?;
        let mut both = [0; 64];
        both[..32].copy_from_slice(&r);
        both[32..].copy_from_slice(&z);
        Ok(Self(both))
    }
}

/// `N` bytes from their hexadecimal text.
fn hex_array<'de, const N: usize, D: serde::Deserializer<'de>>(d: D) -> Result<[u8; N], D::Error> {
    let text = String::deserialize(d)?;
    hex_decode(&text)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| serde::de::Error::custom(format_args!("expected {} hexadecimal digits", 2 * N)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> HostKey {
        HostKey::from_seed([7; 32])
    }

    #[test]
    fn the_host_id_is_the_published_function_of_the_public_key() {
        // Key of RFC 8032, test 1; the id computed with an independent SHA-256 (see docs/protocol.md).
        let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let seed: [u8; 32] = hex_decode(seed).unwrap().try_into().unwrap();
        let key = HostKey::from_seed(seed);
        assert_eq!(
            key.public().to_string(),
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        );
        assert_eq!(key.host_id().to_string(), "066aaf92a4b9bbb096d1042b17b9d4ea");
    }

    #[test]
    fn a_signature_holds_for_its_label_message_and_key_only() {
        let sig = key().sign("vmfs1/a", b"bc");
        let public = key().public();
        assert_eq!(public.verify("vmfs1/a", b"bc", &sig), Ok(()));
        // The length in front of the label: "a" + "bc" is not "ab" + "c".
        assert_eq!(public.verify("vmfs1/ab", b"c", &sig), Err(IdentityError::Signature));
        assert_eq!(public.verify("vmfs1/a", b"bd", &sig), Err(IdentityError::Signature));
        let other = HostKey::from_seed([8; 32]).public();
        assert_eq!(other.verify("vmfs1/a", b"bc", &sig), Err(IdentityError::Signature));
        let mut bent = sig;
        bent.0[3] ^= 1;
        assert!(public.verify("vmfs1/a", b"bc", &bent).is_err());
    }

    #[test]
    fn a_weak_public_key_verifies_nothing() {
        let mut identity_point = [0; 32];
        identity_point[0] = 1;
        let mut sig = [0; 64];
        sig[0] = 1;
        assert!(PublicKey(identity_point).verify("x", b"anything", &Signature(sig)).is_err());
    }

    #[test]
    fn keys_and_signatures_survive_their_encodings() {
        let back = HostKey::from_pkcs8_der(&key().to_pkcs8_der()).unwrap();
        assert_eq!(back.public(), key().public());
        assert_eq!(HostKey::from_pkcs8_der(b"junk").err(), Some(IdentityError::PrivateKey));
        let sig = key().sign("l", b"m");
        let conf = bincode::config::standard();
        let bytes = bincode::serde::encode_to_vec((key().public(), sig), conf).unwrap();
        assert_eq!(bytes.len(), 96, "no length in front of fixed-size values");
        let (got, used): ((PublicKey, Signature), usize) =
            bincode::serde::decode_from_slice(&bytes, conf).unwrap();
        assert_eq!((got, used), ((key().public(), sig), 96));
    }

    #[test]
    fn debug_never_shows_the_private_half() {
        assert!(!format!("{:?}", key()).contains("0707"));
    }
}
