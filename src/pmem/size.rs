// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The length of a virtio-pmem region.

use std::fmt;
use std::str::FromStr;

use crate::support::size::{Size, SizeError, whole_pmds};

/// A length that a virtio-pmem region can have: a positive multiple of 2 MiB, at most `i64::MAX`
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PmemSize(u64);

impl PmemSize {
    /// Checks a length in bytes.
    ///
    /// # Errors
    /// The errors of [`whole_pmds`]; [`SizeError::Unaligned`] names the two nearest valid lengths.
    pub fn new(bytes: u64) -> Result<Self, SizeError> {
        whole_pmds(bytes).map(Self)
    }

    /// The length in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for PmemSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

impl FromStr for PmemSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        Self::new(text.parse::<Size>()?.0)
    }
}
