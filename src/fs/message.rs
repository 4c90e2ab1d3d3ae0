// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! FUSE messages (include/uapi/linux/fuse.h). Checks what the guest wrote, once, on a copy. Knows
//! no file and no ring.

use std::ffi::CStr;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, Extensions, SecContext};
use virtiofsd::fuse::{
    ExtHeader, ForgetOne, InHeader, Opcode, OutHeader, Secctx, SuppGroups, WriteIn,
};
use virtiofsd::soft_idmap::Id;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_of_virtiofsd::ByteValued;

use crate::device::chain::{Chain, Segment};
use crate::device::request::{Header, Request};

use super::lives::Life;

/// Largest number of data bytes of one READ or WRITE (`max_write` of INIT); the value of virtiofsd.
pub(crate) const MAX_DATA_BYTES: u32 = 1 << 20;

/// Largest number of bytes before the data of a WRITE: headers and structures.
const MAX_HEAD_BYTES: u32 = 4096;

/// Largest length of a name (FUSE_NAME_MAX) and of a link's target, in bytes: PATH_MAX of Linux.
const PATH_BYTES: usize = 4096;

/// Largest length of an extended attribute, in bytes: XATTR_NAME_MAX + 1 and XATTR_SIZE_MAX of
/// Linux.
const XATTR_BYTES: usize = 256 + (64 << 10);

/// Largest length of the extensions of a request that creates an inode, in bytes: a security
/// context and supplementary groups.
const EXTENSIONS_BYTES: usize = XATTR_BYTES + 4096;

/// Upper bound of the structures behind a request's header, in bytes.
const STRUCT_BYTES: usize = 128;

/// Largest number of entries in one BATCH_FORGET. The virtio-fs driver of Linux sends no
/// BATCH_FORGET.
const MAX_FORGETS: usize = 4096;

/// Length of a request's header (fuse_in_header), in bytes.
pub(crate) const IN_HEADER_BYTES: usize = size_of::<InHeader>();

/// Length of a reply's header (fuse_out_header), in bytes.
pub(crate) const OUT_HEADER_BYTES: usize = size_of::<OutHeader>();

/// Extension type FUSE_EXT_GROUPS. A smaller type is the number of security contexts in the
/// extension (FUSE_MAX_NR_SECCTX is 31).
const EXT_GROUPS: u32 = 32;

/// Largest number of supplementary groups: NGROUPS_MAX of Linux.
const MAX_GROUPS: u32 = 65536;

/// Number of bytes that are copied before the length of the request is known.
const SHORT_BYTES: usize = 256;

/// The error of a malformed request: EINVAL.
pub(crate) fn invalid() -> io::Error {
    Errno::EINVAL.into()
}

/// Checks a user or group id of the guest. The host's system calls read -1 as "do not change", and
/// the unchanged id would be that of the daemon, often root.
///
/// # Errors
/// EINVAL for -1.
pub(crate) fn valid_id<I: Id<Inner = u32>>(id: I) -> io::Result<I> {
    if id.into_inner() == u32::MAX { Err(invalid()) } else { Ok(id) }
}

/// Reads a structure from the front of `bytes`. None if `bytes` is too short.
pub(crate) fn object<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut object = T::default();
    object.as_mut_slice().copy_from_slice(bytes.get(..size_of::<T>())?);
    Some(object)
}

/// The length of a request by its header, in bytes. `readable`: number of bytes in its buffers.
///
/// # Errors
/// EINVAL for a length that is smaller than the header, larger than `readable`, or larger than
/// any request.
pub(crate) fn request_bytes(header: &InHeader, readable: usize) -> io::Result<usize> {
    let bytes = header.len as usize;
    let possible = (IN_HEADER_BYTES..=readable).contains(&bytes)
        && header.len <= MAX_DATA_BYTES + MAX_HEAD_BYTES;
    if possible { Ok(bytes) } else { Err(invalid()) }
}

/// Largest number of bytes behind the header of a request, without the data of a WRITE. The daemon
/// may hold this number of bytes in memory for each descriptor of a ring. None for an operation
/// that is not supported: only the header of such a request is copied.
pub(crate) fn most_args(opcode: Option<Opcode>) -> Option<usize> {
    use Opcode::*;
    let most = match opcode? {
        Setxattr => XATTR_BYTES,
        Create | Mknod | Mkdir | Symlink => 2 * PATH_BYTES + EXTENSIONS_BYTES,
        BatchForget => MAX_FORGETS * size_of::<ForgetOne>(),
        Ioctl | Bmap | Poll | Getlk | Setlk | Setlkw | NotifyReply | TmpFile => return None,
        _ => 2 * PATH_BYTES,
    };
    Some(most + STRUCT_BYTES)
}

/// The error of a request with more bytes: E2BIG for SETXATTR, as from Linux.
pub(crate) fn too_much(opcode: Option<Opcode>) -> Errno {
    if matches!(opcode, Some(Opcode::Setxattr)) { Errno::E2BIG } else { Errno::EINVAL }
}

/// The part of a request behind its header: structures, then names.
pub(crate) struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Removes the next structure from the front.
    ///
    /// # Errors
    /// EINVAL if too few bytes are left.
    pub(crate) fn take<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let (object, rest) =
            object(self.0).zip(self.0.get(size_of::<T>()..)).ok_or_else(invalid)?;
        self.0 = rest;
        Ok(object)
    }

    /// Removes the next string, up to its NUL, from the front.
    ///
    /// # Errors
    /// EINVAL if no NUL is left.
    pub(crate) fn string(&mut self) -> io::Result<&'a CStr> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| invalid())?;
        self.0 = self.0.get(string.to_bytes_with_nul().len()..).unwrap_or_default();
        Ok(string)
    }

    /// Removes the next string, which must be the name of a directory entry.
    ///
    /// # Errors
    /// EINVAL for an empty name, "." or "..", and for a name with a slash: none may lead out of
    /// the directory.
    pub(crate) fn name(&mut self) -> io::Result<&'a CStr> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(invalid()),
            bytes if bytes.contains(&b'/') => Err(invalid()),
            _ => Ok(name),
        }
    }

    /// Removes and returns all remaining bytes.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Removes the extensions of a request that creates an inode (FUSE_SECURITY_CTX,
    /// FUSE_CREATE_SUPP_GROUP).
    ///
    /// # Errors
    /// EINVAL for an extension that INIT did not enable, that is there twice or has a wrong size.
    pub(crate) fn extensions(&mut self, secctx: bool, groups: bool) -> io::Result<Extensions> {
        let mut found = Extensions::default();
        if !secctx && !groups {
            return Ok(found);
        }
        let mut seen = (false, false);
        while !self.0.is_empty() {
            let (header, body) = self.extension()?;
            let mut body = Self(body);
            match header.ext_type {
                0..EXT_GROUPS if secctx && !seen.0 => {
                    seen.0 = true;
                    found.secctx = body.security_context(header.ext_type)?;
                }
                EXT_GROUPS if groups && !seen.1 => {
                    seen.1 = true;
                    body.groups(&mut found)?;
                }
                _ => return Err(invalid()),
            }
        }
        if secctx && !seen.0 { Err(invalid()) } else { Ok(found) }
    }

    fn extension(&mut self) -> io::Result<(ExtHeader, &'a [u8])> {
        let header: ExtHeader = self.take()?;
        let bytes =
            (header.size as usize).checked_sub(size_of::<ExtHeader>()).ok_or_else(invalid)?;
        let (body, rest) = self.0.split_at_checked(bytes).ok_or_else(invalid)?;
        self.0 = rest;
        Ok((header, body))
    }

    fn security_context(&mut self, count: u32) -> io::Result<Option<SecContext>> {
        match count {
            0 => Ok(None),
            1 => {
                let Secctx { size, .. } = self.take()?;
                let name = self.string()?.to_owned();
                let value = self.0.get(..size as usize).filter(|value| !value.is_empty());
                let secctx = value.ok_or_else(invalid)?.to_vec();
                Ok(Some(SecContext { name, secctx }))
            }
            // Linux sends at most one security context.
            _ => Err(invalid()),
        }
    }

    fn groups(&mut self, found: &mut Extensions) -> io::Result<()> {
        let SuppGroups { nr_groups } = self.take()?;
        if nr_groups > MAX_GROUPS {
            return Err(invalid());
        }
        for _ in 0..nr_groups {
            found.sup_gids.push(valid_id(self.take::<u32>()?.into())?);
        }
        Ok(())
    }
}

/// The reply to a request, without its header.
pub(crate) enum Reply {
    /// No reply: FORGET, BATCH_FORGET and INTERRUPT.
    None,
    /// A reply of these bytes.
    Bytes(Vec<u8>),
    /// A reply of this number of bytes, which are in guest memory already.
    Data(u32),
}

impl Reply {
    /// Success, with an empty reply.
    pub(crate) const DONE: io::Result<Self> = Ok(Self::Bytes(Vec::new()));

    /// A reply of one structure.
    pub(crate) fn object<T: ByteValued>(object: T) -> Self {
        Self::Bytes(object.as_slice().to_vec())
    }
}

/// The head of a message, copied out of guest memory, so that the guest can't change it later.
pub(crate) struct Message {
    pub(crate) header: InHeader,
    /// The header and the bytes behind it, without the data of a WRITE. Empty if `fault` is set.
    copied: Vec<u8>,
    /// Length of the whole request, in bytes.
    pub(crate) bytes: usize,
    /// The life of the driver that sent the request.
    pub(crate) life: Life,
    /// The error to answer with, if the length is wrong or the request too long.
    pub(crate) fault: Option<Errno>,
}

impl Message {
    /// Copies the head of `request`. The caller keeps the ring from being stopped meanwhile: later
    /// the memory may belong to another driver, and `life` would be wrong.
    ///
    /// # Errors
    /// [`Unanswerable`] for a chain without a FUSE header, or without room for that of the reply.
    pub(crate) fn read(request: &Request, life: Life) -> Result<Self, Unanswerable> {
        let chain = request.chain().map_err(|_| Unanswerable)?;
        let ram = request.ram();
        let room = bytes_of(chain.writable());
        // The header of the reply is written to the first writable buffers.
        if !in_ram(&ram, chain.writable(), OUT_HEADER_BYTES) {
            return Err(Unanswerable);
        }
        let readable = bytes_of(chain.readable());
        // Most requests are shorter than SHORT_BYTES. Bytes behind the header may lie in the
        // window, where copy_in() fails.
        let begin = copy_in(&ram, chain.readable(), SHORT_BYTES.min(readable))
            .or_else(|_| copy_in(&ram, chain.readable(), IN_HEADER_BYTES));
        let begin = begin.map_err(|_| Unanswerable)?;
        let header: InHeader = object(&begin).ok_or(Unanswerable)?;
        if room < OUT_HEADER_BYTES && !takes_no_reply(header.opcode) {
            return Err(Unanswerable);
        }
        let (bytes, head) = match extent(&header, readable) {
            Ok(extent) => extent,
            Err(fault) => return Ok(Self::faulty(header, life, fault)),
        };
        let copied = match begin.get(..head) {
            Some(_) => Ok(begin),
            None => copy_in(&ram, chain.readable(), head),
        };
        match copied {
            Ok(mut copied) if copied.len() >= head => {
                copied.truncate(head);
                Ok(Self { header, copied, bytes, life, fault: None })
            }
            _ => Ok(Self::faulty(header, life, Errno::EINVAL)),
        }
    }

    fn faulty(header: InHeader, life: Life, fault: Errno) -> Self {
        Self { header, copied: Vec::new(), bytes: 0, life, fault: Some(fault) }
    }

    /// The bytes behind the header, without the data of a WRITE.
    pub(crate) fn args(&self) -> &[u8] {
        self.copied.get(IN_HEADER_BYTES..).unwrap_or_default()
    }

    pub(crate) fn opcode(&self) -> Option<Opcode> {
        Opcode::try_from(self.header.opcode).ok()
    }

    pub(crate) fn context(&self) -> Context {
        Context::from(self.header)
    }

    pub(crate) fn nodeid(&self) -> u64 {
        self.header.nodeid
    }
}

/// Length of a request, and the length of its head, which is copied; both in bytes.
fn extent(header: &InHeader, readable: usize) -> Result<(usize, usize), Errno> {
    let bytes = request_bytes(header, readable).map_err(|_| Errno::EINVAL)?;
    let opcode = Opcode::try_from(header.opcode).ok();
    if matches!(opcode, Some(Opcode::Write)) {
        return Ok((bytes, bytes.min(IN_HEADER_BYTES + size_of::<WriteIn>())));
    }
    match most_args(opcode) {
        None => Ok((bytes, IN_HEADER_BYTES)),
        Some(most) if bytes - IN_HEADER_BYTES <= most => Ok((bytes, bytes)),
        Some(_) => Err(too_much(opcode)),
    }
}

fn bytes_of(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.bytes as usize).sum()
}

/// Whether the first `bytes` bytes of `segments`, or all bytes if they are fewer, lie in RAM.
pub(crate) fn in_ram(ram: &GuestMemoryMmap, segments: &[Segment], bytes: usize) -> bool {
    let mut left = bytes;
    for segment in segments {
        let now = left.min(segment.bytes as usize);
        if now > 0 && !GuestMemoryBackend::check_range(ram, segment.at, now) {
            return false;
        }
        left -= now;
    }
    true
}

/// A chain that holds no FUSE message. It is returned to the driver with a used length of 0.
pub(crate) struct Unanswerable;

pub(crate) fn takes_no_reply(opcode: u32) -> bool {
    [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt].iter().any(|o| *o as u32 == opcode)
}

pub(crate) fn writable(request: &Request) -> &[Segment] {
    request.chain().map(Chain::writable).unwrap_or_default()
}

/// Number of bytes that the guest has for the reply behind its header.
pub(crate) fn room(request: &Request) -> usize {
    bytes_of(writable(request)).saturating_sub(OUT_HEADER_BYTES)
}

/// Copies the first `most` bytes of `segments` out of guest memory.
///
/// # Errors
/// EFAULT for memory that is no RAM: no driver puts the head of a request there.
pub(crate) fn copy_in(
    ram: &GuestMemoryMmap,
    segments: &[Segment],
    most: usize,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(most.min(MAX_DATA_BYTES as usize));
    for segment in segments {
        let now = (most - bytes.len()).min(segment.bytes as usize);
        if now == 0 {
            continue;
        }
        let start = bytes.len();
        for slice in GuestMemoryBackend::get_slices(ram, segment.at, now) {
            let slice = slice.map_err(|_| Errno::EFAULT)?;
            let end = bytes.len();
            bytes.resize(end + slice.len(), 0);
            if let Some(to) = bytes.get_mut(end..) {
                slice.copy_to(to);
            }
        }
        debug_assert_eq!(bytes.len() - start, now);
    }
    Ok(bytes)
}

/// The header of a reply with `bytes` bytes behind it.
pub(crate) fn out_header(unique: u64, error: i32, bytes: usize) -> Header {
    let len = (OUT_HEADER_BYTES + bytes) as u32;
    let mut header = Header::default();
    header.copy_from_slice(OutHeader { len, error, unique }.as_slice());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    /// Shows: a name that leads out of its directory, or has no end in the request, is refused.
    #[test]
    fn names() {
        let name = |bytes| Args::new(bytes).name().map(CStr::to_bytes);
        assert_eq!(name(b"a\0rest").unwrap(), b"a");
        assert_eq!(name(b"...\0").unwrap(), b"...");
        for bad in [&b""[..], b"\0", b".\0", b"..\0", b"a/b\0", b"/\0", b"no end"] {
            assert_eq!(error_of(name(bad)), Some(libc::EINVAL), "{bad:?}");
        }
    }

    /// Shows: take() removes structures in order, and refuses a short one.
    #[test]
    fn structures() {
        let mut args = Args::new(&[1, 0, 0, 0, 2, 0, 0, 0, 9]);
        assert_eq!(args.take::<u32>().unwrap(), 1);
        assert_eq!(args.take::<u32>().unwrap(), 2);
        assert_eq!(error_of(args.take::<u32>()), Some(libc::EINVAL));
        assert_eq!(args.rest(), &[9]);
    }

    /// Shows: a length in the header that the request can't have is refused.
    #[test]
    fn lengths() {
        let of = |len, readable| {
            error_of(request_bytes(&InHeader { len, ..InHeader::default() }, readable))
        };
        assert_eq!(of(40, 40), None);
        assert_eq!(of(40, 4000), None, "bytes behind the request's length are ignored");
        for (len, readable) in
            [(0, 40), (39, 40), (41, 40), (u32::MAX, 1 << 22), (2 << 20, 4 << 20)]
        {
            assert_eq!(of(len, readable), Some(libc::EINVAL), "{len} {readable}");
        }
    }

    fn extension(ext_type: u32, body: &[u8]) -> Vec<u8> {
        let size = (size_of::<ExtHeader>() + body.len()) as u32;
        [size.to_ne_bytes(), ext_type.to_ne_bytes()]
            .concat()
            .into_iter()
            .chain(body.to_vec())
            .collect()
    }

    /// Shows: groups and security contexts are read, and each wrong size is refused.
    #[test]
    fn extensions() {
        let mut groups = 2u32.to_ne_bytes().to_vec();
        groups.extend([7u32, 8, 0].iter().flat_map(|gid| gid.to_ne_bytes()));
        let context = [&4u32.to_ne_bytes()[..], &[0; 4], b"n\0", b"ctx1", &[0; 6]].concat();
        let both = [extension(32, &groups), extension(1, &context)].concat();
        let found = Args::new(&both).extensions(true, true).unwrap();
        assert_eq!(found.sup_gids, [7.into(), 8.into()]);
        let secctx = found.secctx.unwrap();
        assert_eq!((secctx.name.to_bytes(), &secctx.secctx[..]), (&b"n"[..], &b"ctx1"[..]));

        assert!(Args::new(&both).extensions(false, false).unwrap().secctx.is_none());
        let huge_groups = extension(32, &u32::MAX.to_ne_bytes());
        let long_context = extension(1, &[&99u32.to_ne_bytes()[..], &[0; 4], b"n\0abc"].concat());
        for bad in [
            both[..both.len() - 1].to_vec(),
            extension(33, &[]),
            extension(2, &context),
            huge_groups,
            long_context,
            [extension(32, &groups), extension(32, &groups)].concat(),
            vec![1, 0, 0, 0, 0, 0, 0, 0],
            Vec::new(),
        ] {
            assert!(Args::new(&bad).extensions(true, true).is_err(), "{bad:?}");
        }
    }
}
