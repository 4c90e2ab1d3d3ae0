// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: the seam between the rings and a device. Knows no vhost-user.

use std::fs::File;
use std::sync::Arc;

use crate::request::Request;
use crate::window::{MapError, Mapper, WindowBytes};

/// What a virtio device offers to its session.
///
/// A device gets a request and answers it with a status; it never touches a ring.
pub trait Device: Send + Sync + 'static {
    /// Device-specific virtio feature bits (virtio 1.4 section 2.2: bits 0 to 23).
    fn features(&self) -> u64;

    /// The device's config space.
    fn config(&self) -> &[u8];

    /// The length of shared memory region 0.
    fn window_bytes(&self) -> WindowBytes;

    /// The file that shared memory region 0 shows, from its first byte to its last.
    fn window_file(&self) -> &Arc<File>;

    /// Makes region 0 show the file, through the front-end behind `mapper`. Called at each start that
    /// finds it not shown, from a thread that may block.
    ///
    /// # Errors
    /// The mapper's.
    fn map_window(&self, mapper: Arc<dyn Mapper>) -> Result<(), MapError>;

    /// Takes one request. Must not block: it runs under the ring's lock.
    ///
    /// Requests of one ring must be completed in the order in which they came:
    /// a stop hands back those that are open by moving the ring's base.
    fn handle(&self, request: Request);

    /// Called once when a session is over, to report on it.
    fn session_ended(&self);
}
