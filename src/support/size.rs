// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers of bytes as users write and read them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::units::PMD_BYTES;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A number of bytes; its text form has a binary unit: `4096`, `512M`, `1G`, `1GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            _ => return Err(SizeError::Syntax),
        };
        if number.is_empty() {
            return Err(SizeError::Syntax);
        }
        let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
        number.checked_mul(unit).map(Size).ok_or(SizeError::TooLarge)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, letter) in [(TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{letter}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Returns `bytes` if a file can have this length and it is a positive multiple of 2 MiB
/// ([`PMD_BYTES`]).
///
/// # Errors
/// [`SizeError::TooLarge`] above `i64::MAX`; else [`SizeError::Unaligned`] with the two nearest
/// valid lengths.
pub fn whole_pmds(bytes: u64) -> Result<u64, SizeError> {
    if bytes > i64::MAX as u64 {
        return Err(SizeError::TooLarge);
    }
    if bytes == 0 || !bytes.is_multiple_of(PMD_BYTES) {
        let below = (bytes - bytes % PMD_BYTES).max(PMD_BYTES);
        let above = below + PMD_BYTES;
        return Err(SizeError::Unaligned { bytes, below: Size(below), above: Size(above) });
    }
    Ok(bytes)
}

/// Why a length is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SizeError {
    /// The text is no number with a unit.
    #[error("write a size as a number and a unit, for example 512M or 1G")]
    Syntax,
    /// More than `i64::MAX` bytes, the limit on a file's length; or more than a u64 holds.
    #[error("the size is larger than any file can be")]
    TooLarge,
    /// Zero, or no multiple of 2 MiB.
    #[error("{bytes} bytes is no multiple of 2 MiB; {below} or {above} would do")]
    Unaligned {
        /// The refused length in bytes.
        bytes: u64,
        /// The nearest valid length below, or 2 MiB.
        below: Size,
        /// The valid length after `below`.
        above: Size,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: a number with a binary unit is parsed; all other texts, and numbers of more than 64
    /// bits, are refused.
    #[test]
    fn sizes_are_parsed_with_their_unit() {
        for (text, bytes) in
            [("4096", 4096), ("512M", 512 * MIB), ("1g", GIB), ("3GiB", 3 * GIB), ("2T", 2 * TIB)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1X", "1 G", "0x10", "1GB"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Syntax), "{text}");
        }
        for text in ["99999999999999999999", "18446744073709551615K"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge), "{text}");
        }
    }

    /// Shows: a size is written in the largest unit of which it is a multiple.
    #[test]
    fn sizes_are_written_in_the_largest_unit_that_fits() {
        for (bytes, text) in [
            (0, "0"),
            (1000, "1000"),
            (2 * MIB, "2M"),
            (1536 * MIB, "1536M"),
            (GIB, "1G"),
            (TIB, "1T"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    /// Shows: the error of a length that is no multiple of 2 MiB names the nearest valid lengths.
    #[test]
    fn an_invalid_size_names_two_valid_ones() {
        for (bytes, below, above) in
            [(3 * MIB, "2M", "4M"), (GIB + 1, "1G", "1026M"), (0, "2M", "4M")]
        {
            let line = whole_pmds(bytes).unwrap_err().to_string();
            assert!(line.ends_with(&format!("{below} or {above} would do")), "{line}");
        }
        assert_eq!(whole_pmds(u64::MAX), Err(SizeError::TooLarge));
        assert!(whole_pmds(i64::MAX as u64).unwrap_err().to_string().contains("would do"));
        assert_eq!(whole_pmds(2 * MIB), Ok(2 * MIB));
    }
}
