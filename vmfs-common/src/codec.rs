//! The canonical byte form of what is hashed: little-endian integers, counts and lengths as u32,
//! nothing optional without a flag, no trailing bytes.

/// Bytes that are not the canonical form of what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More bytes were needed.
    #[error("truncated")]
    Truncated,
    /// Bytes were left over.
    #[error("{0} trailing bytes")]
    Trailing(usize),
    /// A length or count is above its limit.
    #[error("a length of {got} exceeds the limit of {limit}")]
    TooLong {
        /// What the bytes say.
        got: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A field has a value that it may not have.
    #[error("invalid {0}")]
    Invalid(&'static str),
    /// Another format level.
    #[error("format level {got}, this release knows {known}")]
    Version {
        /// What the bytes say.
        got: u32,
        /// What this release reads.
        known: u32,
    },
}

/// Builds a canonical byte form.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// An empty one with room for `bytes`.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }
    /// One byte.
    pub fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    /// Two bytes.
    pub fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    /// Four bytes.
    pub fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    /// Eight bytes.
    pub fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    /// A count.
    ///
    /// # Panics
    /// Above `u32::MAX`, which no bounded collection reaches.
    pub fn count(&mut self, n: usize) {
        self.u32(u32::try_from(n).expect("invariant: collections are bounded far below u32::MAX"));
    }
    /// Raw bytes of a length both sides know.
    pub fn bytes(&mut self, b: &[u8]) {
        self.0.extend_from_slice(b);
    }
    /// Length-prefixed bytes.
    pub fn var(&mut self, b: &[u8]) {
        self.count(b.len());
        self.bytes(b);
    }
    /// Bytes so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// True when nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The result.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads a canonical byte form.
#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// From the start of `b`.
    #[must_use]
    pub const fn new(b: &'a [u8]) -> Self {
        Self(b)
    }
    /// The next `n` bytes.
    ///
    /// # Errors
    /// [`CodecError::Truncated`].
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], CodecError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(CodecError::Truncated)?;
        self.0 = rest;
        Ok(head)
    }
    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`CodecError::Truncated`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        Ok(self.take(N)?.try_into().expect("invariant: take returned N bytes"))
    }
    /// One byte.
    ///
    /// # Errors
    /// [`CodecError::Truncated`].
    pub fn u8(&mut self) -> Result<u8, CodecError> {
        Ok(self.array::<1>()?[0])
    }
    /// A byte that is 0 or 1.
    ///
    /// # Errors
    /// Anything else, or no byte.
    pub fn flag(&mut self) -> Result<bool, CodecError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(CodecError::Invalid("flag")),
        }
    }
    /// Two bytes.
    ///
    /// # Errors
    /// [`CodecError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, CodecError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// Four bytes.
    ///
    /// # Errors
    /// [`CodecError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Eight bytes.
    ///
    /// # Errors
    /// [`CodecError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// A count of at most `limit`.
    ///
    /// # Errors
    /// Above the limit, or truncated.
    pub fn count(&mut self, limit: usize) -> Result<usize, CodecError> {
        let got = self.u32()? as usize;
        if got > limit { Err(CodecError::TooLong { got, limit }) } else { Ok(got) }
    }
    /// Length-prefixed bytes, at most `limit` of them.
    ///
    /// # Errors
    /// Above the limit, or truncated.
    pub fn var(&mut self, limit: usize) -> Result<&'a [u8], CodecError> {
        let n = self.count(limit)?;
        self.take(n)
    }
    /// Length-prefixed UTF-8, at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Reader::var`], or not UTF-8.
    pub fn text(&mut self, limit: usize) -> Result<String, CodecError> {
        String::from_utf8(self.var(limit)?.to_vec()).map_err(|_| CodecError::Invalid("text"))
    }
    /// Bytes left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.0.len()
    }
    /// Ends the reading.
    ///
    /// # Errors
    /// [`CodecError::Trailing`].
    pub const fn end(self) -> Result<(), CodecError> {
        if self.0.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.0.len())) }
    }
}
