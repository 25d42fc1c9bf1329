//! Shares of an epoch's secret: Shamir over GF(256) (`vsss-rs`), threshold = quorum. They make an
//! ended epoch auditable by everybody; elections are decided by votes alone.

use std::convert::Infallible;

use rand_core::{TryCryptoRng, TryRng};
use vmfs_common::Epoch;
use vmfs_common::chain::{EpochSecret, Share};
use vmfs_common::ids::Digest;
use vsss_rs::Gf256;
use zeroize::{Zeroize as _, Zeroizing};

/// Bytes of a share: its number and 32 bytes.
pub(crate) const SHARE_BYTES: usize = 33;

/// The engine's entropy as the generator that `vsss-rs` wants.
struct Entropy<'a>(&'a mut dyn FnMut(&mut [u8]));

impl TryRng for Entropy<'_> {
    type Error = Infallible;
    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut b = [0; 4];
        (self.0)(&mut b);
        Ok(u32::from_le_bytes(b))
    }
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut b = [0; 8];
        (self.0)(&mut b);
        Ok(u64::from_le_bytes(b))
    }
    fn try_fill_bytes(&mut self, buf: &mut [u8]) -> Result<(), Infallible> {
        (self.0)(buf);
        Ok(())
    }
}
impl TryCryptoRng for Entropy<'_> {}

/// One share for each of `members`, `quorum` of which rebuild the secret. None for fewer than two
/// members: the owner has it.
pub(crate) fn split(
    secret: &EpochSecret,
    quorum: usize,
    members: usize,
    entropy: &mut dyn FnMut(&mut [u8]),
) -> Vec<Share> {
    if members < 2 {
        return Vec::new();
    }
    Gf256::split_bytes(quorum, members, secret.expose(), Entropy(entropy))
        .expect("invariant: 2 <= quorum <= members <= 16, and the secret is not empty")
        .into_iter()
        .map(Share::from_bytes)
        .collect()
}

/// The secret of `epoch` that `shares` (of any epochs) rebuild, if it is the one committed to.
pub(crate) fn rebuild(shares: &[(Epoch, Share)], epoch: Epoch, commitment: Digest) -> Option<EpochSecret> {
    let mut of_epoch: Vec<&[u8]> =
        shares.iter().filter(|(e, _)| *e == epoch).map(|(_, s)| s.expose()).collect();
    of_epoch.retain(|s| s.len() == SHARE_BYTES && s[0] != 0);
    of_epoch.sort_unstable();
    of_epoch.dedup_by_key(|s| s[0]);
    if of_epoch.len() < 2 {
        return None;
    }
    let mut copies: Vec<Vec<u8>> = of_epoch.iter().map(|s| s.to_vec()).collect();
    let bytes = Gf256::combine_bytes(&copies).ok().map(Zeroizing::new);
    copies.zeroize();
    let secret = EpochSecret::from_bytes(bytes?[..].try_into().ok()?);
    (secret.commitment() == commitment).then_some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_of_shares_rebuilds_the_secret_and_fewer_or_false_ones_do_not() {
        let mut n = 1u8;
        let mut entropy =
            |b: &mut [u8]| b.iter_mut().for_each(|x| (n = n.wrapping_mul(5).wrapping_add(3), *x = n).0);
        let secret = EpochSecret::from_bytes([0xa5; 32]);
        let epoch = Epoch { number: 3, ..Epoch::default() };
        let shares: Vec<_> = split(&secret, 3, 5, &mut entropy).into_iter().map(|s| (epoch, s)).collect();
        assert_eq!(shares.len(), 5);
        assert!(shares.iter().all(|(_, s)| s.expose().len() == SHARE_BYTES));
        let good = secret.commitment();
        for pick in [[0, 1, 2], [4, 2, 0], [1, 3, 4]] {
            let some: Vec<_> = pick.iter().map(|i| shares[*i].clone()).collect();
            assert_eq!(rebuild(&some, epoch, good).as_ref(), Some(&secret));
        }
        assert_eq!(rebuild(&shares[..2], epoch, good), None);
        assert_eq!(rebuild(&[shares[0].clone(), shares[0].clone(), shares[1].clone()], epoch, good), None);
        let mut bent = shares[..3].to_vec();
        let mut bytes = bent[1].1.expose().to_vec();
        bytes[7] ^= 1;
        bent[1].1 = Share::from_bytes(bytes);
        assert_eq!(rebuild(&bent, epoch, good), None);
        assert_eq!(rebuild(&shares, Epoch::default(), good), None);
    }
}
