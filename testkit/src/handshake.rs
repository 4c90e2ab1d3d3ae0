// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages that QEMU sends before the guest boots, and for each ring at a start, in its order.

use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VringConfigData};

use crate::channel::Channel;
use crate::machine::{CallError, Machine};
use crate::strict_vmm::{Ring, VmmOptions};

/// The back-end's replies during the set-up.
#[derive(Debug, Clone)]
pub struct Offer {
    /// The virtio features offered.
    pub features: u64,
    /// The vhost-user protocol features offered.
    pub protocol: VhostUserProtocolFeatures,
    /// The number of queues (GET_QUEUE_NUM).
    pub queues: u64,
    /// The config space.
    pub config: Vec<u8>,
    /// The lengths of the shared memory regions, in bytes.
    pub windows: Vec<u64>,
}

/// Negotiates. Sets whether `channel` sends acks.
pub(super) fn negotiate(
    machine: &mut Machine,
    channel: &mut Channel,
    options: &VmmOptions,
) -> Result<(Offer, VhostUserProtocolFeatures), CallError> {
    use VhostUserProtocolFeatures as P;
    let features = machine.call("GET_FEATURES", false, |f| f.get_features())?;
    let protocol = machine.call("GET_PROTOCOL_FEATURES", false, |f| f.get_protocol_features())?;
    let known = P::MQ
        | P::REPLY_ACK
        | P::BACKEND_REQ
        | P::CONFIG
        | P::BACKEND_SEND_FD
        | P::CONFIGURE_MEM_SLOTS
        | P::RESET_DEVICE
        | P::STATUS
        | P::SHARED_OBJECT
        | P::SHMEM;
    let acked = protocol & known & !options.lacks;
    machine.call("SET_PROTOCOL_FEATURES", false, |f| f.set_protocol_features(acked))?;
    let queues = machine.call("GET_QUEUE_NUM", false, |f| f.get_queue_num())?;
    channel.reply_ack = acked.contains(P::REPLY_ACK);
    if acked.contains(P::BACKEND_REQ) {
        let tx = channel.theirs();
        machine.call("SET_BACKEND_REQ_FD", false, |f| f.set_backend_request_fd(&tx))?;
    }
    let mut windows = Vec::new();
    if acked.contains(P::SHMEM) {
        let shmem = machine.call("GET_SHMEM_CONFIG", false, |f| f.get_shmem_config())?;
        windows.extend_from_slice(&shmem.memory_sizes[..shmem.nregions as usize]);
    }
    machine.call("SET_OWNER", false, |f| f.set_owner())?;
    let config = if acked.contains(P::CONFIG) {
        get_config(machine, options.config_bytes)?
    } else {
        Vec::new()
    };
    Ok((Offer { features, protocol, queues, config, windows }, acked))
}

/// GET_CONFIG of the first `bytes` bytes.
pub(super) fn get_config(machine: &mut Machine, bytes: u32) -> Result<Vec<u8>, CallError> {
    let (flags, zeros) = (VhostUserConfigFlags::empty(), vec![0u8; bytes as usize]);
    let reply = machine.call("GET_CONFIG", false, |f| f.get_config(0, bytes, flags, &zeros))?;
    Ok(reply.1)
}

/// Sets one ring up at a start; does not enable it.
pub(super) fn set_up_ring(
    machine: &mut Machine,
    i: usize,
    ring: &mut dyn Ring,
    base: u16,
) -> Result<(), CallError> {
    let num = ring.options().size;
    machine.call("SET_VRING_NUM", false, |f| f.set_vring_num(i, num))?;
    machine.call("SET_VRING_BASE", false, |f| f.set_vring_base(i, base))?;
    let [desc, avail, used] = ring.host_addresses();
    let addresses = VringConfigData {
        queue_max_size: num,
        queue_size: num,
        flags: 0,
        desc_table_addr: desc,
        used_ring_addr: used,
        avail_ring_addr: avail,
        log_addr: None,
    };
    machine.call("SET_VRING_ADDR", true, |f| f.set_vring_addr(i, &addresses))?;
    let kick = ring.fresh_kick();
    machine.call("SET_VRING_KICK", false, |f| f.set_vring_kick(i, &kick))
}
