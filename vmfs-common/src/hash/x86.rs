//! SHA-256 by the processor's instructions for it. Source of the algorithm: FIPS 180-4.

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_loadu_si128, _mm_set_epi32, _mm_set_epi64x,
    _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
    _mm_shuffle_epi32, _mm_storeu_si128,
};

use crate::ids::BLOCK_BYTES;

/// Bytes of one step of the compression function.
pub(super) const STEP_BYTES: usize = 64;

/// The round constants of FIPS 180-4, section 4.2.2.
static K: [u32; 64] = [
    0x428a_2f98,
    0x7137_4491,
    0xb5c0_fbcf,
    0xe9b5_dba5,
    0x3956_c25b,
    0x59f1_11f1,
    0x923f_82a4,
    0xab1c_5ed5,
    0xd807_aa98,
    0x1283_5b01,
    0x2431_85be,
    0x550c_7dc3,
    0x72be_5d74,
    0x80de_b1fe,
    0x9bdc_06a7,
    0xc19b_f174,
    0xe49b_69c1,
    0xefbe_4786,
    0x0fc1_9dc6,
    0x240c_a1cc,
    0x2de9_2c6f,
    0x4a74_84aa,
    0x5cb0_a9dc,
    0x76f9_88da,
    0x983e_5152,
    0xa831_c66d,
    0xb003_27c8,
    0xbf59_7fc7,
    0xc6e0_0bf3,
    0xd5a7_9147,
    0x06ca_6351,
    0x1429_2967,
    0x27b7_0a85,
    0x2e1b_2138,
    0x4d2c_6dfc,
    0x5338_0d13,
    0x650a_7354,
    0x766a_0abb,
    0x81c2_c92e,
    0x9272_2c85,
    0xa2bf_e8a1,
    0xa81a_664b,
    0xc24b_8b70,
    0xc76c_51a3,
    0xd192_e819,
    0xd699_0624,
    0xf40e_3585,
    0x106a_a070,
    0x19a4_c116,
    0x1e37_6c08,
    0x2748_774c,
    0x34b0_bcb5,
    0x391c_0cb3,
    0x4ed8_aa4a,
    0x5b9c_ca4f,
    0x682e_6ff3,
    0x748f_82ee,
    0x78a5_636f,
    0x84c8_7814,
    0x8cc7_0208,
    0x90be_fffa,
    0xa450_6ceb,
    0xbef9_a3f7,
    0xc671_78f2,
];

/// The initial state, section 5.3.3.
const INITIAL: [i32; 8] = [
    0x6a09_e667_u32.cast_signed(),
    0xbb67_ae85_u32.cast_signed(),
    0x3c6e_f372_u32.cast_signed(),
    0xa54f_f53a_u32.cast_signed(),
    0x510e_527f_u32.cast_signed(),
    0x9b05_688c_u32.cast_signed(),
    0x1f83_d9ab_u32.cast_signed(),
    0x5be0_cd19_u32.cast_signed(),
];

/// What follows a message of 4096 bytes: one bit, zeros, the length in bits.
static PADDING: [u8; STEP_BYTES] = {
    let mut p = [0; STEP_BYTES];
    p[0] = 0x80;
    // 4096 * 8 = 0x8000.
    assert!(BLOCK_BYTES == 4096);
    p[62] = 0x80;
    p
};

pub(super) fn is_available() -> bool {
    std::arch::is_x86_feature_detected!("sha")
        && std::arch::is_x86_feature_detected!("ssse3")
        && std::arch::is_x86_feature_detected!("sse4.1")
}

/// What has been hashed of `N` messages.
#[derive(Clone, Copy)]
pub(super) struct States<const N: usize> {
    abef: [__m128i; N],
    cdgh: [__m128i; N],
}

/// Of nothing yet.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
pub(super) fn begin<const N: usize>() -> States<N> {
    let [a, b, c, d, e, f, g, h] = INITIAL;
    States { abef: [_mm_set_epi32(a, b, e, f); N], cdgh: [_mm_set_epi32(c, d, g, h); N] }
}

/// Hashes the next bytes of each message, as many whole steps of each.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
pub(super) fn absorb<const N: usize>(states: &mut States<N>, messages: [&[u8]; N]) {
    for at in (0..messages[0].len()).step_by(STEP_BYTES) {
        compress(&mut states.abef, &mut states.cdgh, |n| &messages[n][at..at + STEP_BYTES]);
    }
}

/// The digest of message number `n`, all of which has been hashed with its padding.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
pub(super) fn finish<const N: usize>(states: &States<N>, n: usize) -> [u8; 32] {
    output(states.abef[n], states.cdgh[n])
}

/// Message number `n` alone.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
pub(super) fn one<const N: usize>(states: &States<N>, n: usize) -> States<1> {
    States { abef: [states.abef[n]], cdgh: [states.cdgh[n]] }
}

/// SHA-256 of `N` blocks of 4 KiB, their rounds interleaved.
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
pub(super) fn sha256<const N: usize>(blocks: [&[u8; BLOCK_BYTES]; N]) -> [[u8; 32]; N] {
    let States { mut abef, mut cdgh } = begin::<N>();
    // Of a length that is known, which is worth some percent.
    for at in (0..BLOCK_BYTES).step_by(STEP_BYTES) {
        compress(&mut abef, &mut cdgh, |n| &blocks[n][at..at + STEP_BYTES]);
    }
    compress(&mut abef, &mut cdgh, |_| &PADDING);
    std::array::from_fn(|n| output(abef[n], cdgh[n]))
}

#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn compress<'a, const N: usize>(
    abef: &mut [__m128i; N],
    cdgh: &mut [__m128i; N],
    message: impl Fn(usize) -> &'a [u8],
) {
    let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let mut w = [[_mm_setzero_si128(); 4]; N];
    for (n, w) in w.iter_mut().enumerate() {
        let bytes: &[u8; STEP_BYTES] = message(n).try_into().expect("invariant: a step's bytes");
        for (w, from) in w.iter_mut().zip(bytes.as_chunks::<16>().0) {
            // SAFETY: reads the 16 bytes of `from`, for which it needs no alignment.
            *w = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
            *w = _mm_shuffle_epi8(*w, swap);
        }
    }
    let (mut s0, mut s1) = (*abef, *cdgh);
    // Four rounds each. Written out, so that every index is a constant and all of it stays in registers.
    macro_rules! rounds {
        ($($group:literal)*) => { $(
            // SAFETY: reads four of the 64 constants, for which it needs no alignment.
            let k = unsafe { _mm_loadu_si128(K.as_ptr().add(4 * $group).cast()) };
            for n in 0..N {
                let x = _mm_add_epi32(w[n][$group % 4], k);
                s1[n] = _mm_sha256rnds2_epu32(s1[n], s0[n], x);
                s0[n] = _mm_sha256rnds2_epu32(s0[n], s1[n], _mm_shuffle_epi32(x, 0x0e));
            }
            if $group < 12 {
                // The next four words of the schedule, in place of those just used.
                for n in 0..N {
                    let shifted = _mm_alignr_epi8(w[n][($group + 3) % 4], w[n][($group + 2) % 4], 4);
                    let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[n][$group % 4], w[n][($group + 1) % 4]), shifted);
                    w[n][$group % 4] = _mm_sha256msg2_epu32(sum, w[n][($group + 3) % 4]);
                }
            }
        )* };
    }
    rounds!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    for n in 0..N {
        abef[n] = _mm_add_epi32(s0[n], abef[n]);
        cdgh[n] = _mm_add_epi32(s1[n], cdgh[n]);
    }
}

#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn output(abef: __m128i, cdgh: __m128i) -> [u8; 32] {
    let words = |v: __m128i| {
        let mut w = [0u32; 4];
        // SAFETY: writes the 16 bytes of `w`, for which it needs no alignment.
        unsafe { _mm_storeu_si128(w.as_mut_ptr().cast(), v) };
        w
    };
    let ([f, e, b, a], [h, g, d, c]) = (words(abef), words(cdgh));
    let mut out = [0; 32];
    for (to, word) in out.as_chunks_mut::<4>().0.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *to = word.to_be_bytes();
    }
    out
}
