//! What the fuzz targets reach of this crate that nobody else does. See `docs/testing.md`.

use crate::meta::Meta;

/// A machine's own durable record.
///
/// # Panics
/// When something taken has another byte form, or of an earlier version another meaning.
pub fn meta_record(data: &[u8]) -> bool {
    let mut bytes = data.to_vec();
    let Some(body) = bytes.len().checked_sub(4) else { return Meta::decode(data).is_ok() };
    let crc = crc32c::crc32c(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_le_bytes());
    let Ok(meta) = Meta::decode(&bytes) else { return false };
    let again = meta.encode();
    if again.get(..8) == bytes.get(..8) {
        assert_eq!(again, bytes, "a meta record has one form");
    } else {
        assert_eq!(
            Meta::decode(&again),
            Ok(meta),
            "one of an earlier version means the same in the present form"
        );
    }
    true
}

/// The secrets in a meta record: of the epochs begun and bid for, and the shares of others'. For the test
/// that looks for them where they must not be.
#[must_use]
pub fn secrets_of(record: &[u8]) -> Vec<Vec<u8>> {
    let Ok(meta) = Meta::decode(record) else { return Vec::new() };
    let epochs = [&meta.begun, &meta.bid].into_iter().flatten().map(|(_, s)| s.expose().to_vec());
    epochs.chain(meta.shares.iter().map(|(_, s)| s.expose().to_vec())).collect()
}
