//! The UDP socket and the QUIC settings.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
};

use crate::config::{Congestion, NetConfig};
use crate::error::NetError;
use crate::pki::HostIdentity;
use crate::runtime::Runtime;
use crate::tls;

/// Socket buffers asked for; the kernel may give less.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// Largest UDP payload with segmentation offload: quinn batches ten, and the kernel refuses batches of
/// more than 64 KiB (with EMSGSIZE, which quinn takes for a lost packet).
const GSO_MTU_MAX: u16 = 6500;
/// Packets per acknowledgement when packets are as large as a tenth of the send window.
const NEAR_ACK_EVERY_MAX: u32 = 4;
/// Largest UDP payload over IPv4.
const UDP_PAYLOAD_MAX: u16 = 65_507;
/// Bytes that a peer may send before it is known who it is.
const STRANGER_WINDOW_BYTES: u32 = 64 << 10;

/// The endpoint with its settings for peers on this machine and elsewhere.
pub(crate) struct Transport {
    pub(crate) endpoint: Endpoint,
    client: [ClientConfig; 2],
    server: [Arc<ServerConfig>; 2],
}

impl Transport {
    pub(crate) fn open(cfg: &NetConfig, identity: &HostIdentity) -> Result<Self, NetError> {
        let [far, near] = [false, true].map(|near| Arc::new(transport(cfg, near)));
        let client_tls = Arc::new(tls::client(identity, cfg.tuning.aes128)?);
        let server_tls = Arc::new(tls::server(identity, cfg.tuning.aes128)?);
        let client = [&far, &near].map(|t| {
            let mut c = ClientConfig::new(Arc::clone(&client_tls) as _);
            c.transport_config(Arc::clone(t));
            c
        });
        let server = [&far, &near].map(|t| {
            let mut s = ServerConfig::with_crypto(Arc::clone(&server_tls) as _);
            s.transport_config(Arc::clone(t)).max_incoming(256).incoming_buffer_size(64 << 10);
            Arc::new(s)
        });
        let bind = |source| NetError::Bind { address: cfg.listen, source };
        let socket = UdpSocket::bind(cfg.listen).map_err(bind)?;
        enlarge_buffers(&socket);
        let mut endpoint = EndpointConfig::default();
        endpoint.max_udp_payload_size(UDP_PAYLOAD_MAX).expect("invariant: within the range that QUIC allows");
        let endpoint =
            Endpoint::new(endpoint, Some((*server[0]).clone()), socket, Arc::new(Runtime)).map_err(bind)?;
        Ok(Self { endpoint, client, server })
    }

    /// Settings for dialling `to`.
    pub(crate) fn client_for(&self, to: SocketAddr) -> ClientConfig {
        self.client[usize::from(is_near(to))].clone()
    }

    /// Settings for a connection from `from`.
    pub(crate) fn server_for(&self, from: SocketAddr) -> Arc<ServerConfig> {
        Arc::clone(&self.server[usize::from(is_near(from))])
    }
}

pub(crate) fn is_near(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// As large as we may: beyond `rmem_max` where the capability allows it, else up to it.
fn enlarge_buffers(socket: &UdpSocket) {
    use rustix::net::sockopt;
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER_BYTES).is_err()
        && let Err(e) = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES)
    {
        tracing::debug!("receive buffer stays at its default: {e}");
    }
    if let Err(e) = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES) {
        tracing::debug!("send buffer stays at its default: {e}");
    }
}

fn transport(cfg: &NetConfig, near: bool) -> TransportConfig {
    let tuning = &cfg.tuning;
    let mut t = TransportConfig::default();
    let idle_ms = u32::try_from(cfg.idle_timeout.as_millis()).unwrap_or(u32::MAX);
    t.max_idle_timeout(Some(VarInt::from_u32(idle_ms).into()));
    t.keep_alive_interval(Some(cfg.idle_timeout / 4));
    // Raised by `admit_peer` once it is known who is there: until then one stream, and little on it.
    t.max_concurrent_uni_streams(VarInt::from_u32(0));
    t.max_concurrent_bidi_streams(VarInt::from_u32(1));
    t.receive_window(VarInt::from_u32(STRANGER_WINDOW_BYTES));
    let stream_window_bytes = if near { cfg.stream_window_bytes / 4 } else { cfg.stream_window_bytes };
    t.stream_receive_window(VarInt::from_u32(stream_window_bytes));
    t.send_window(u64::from(cfg.send_window_bytes));
    t.datagram_receive_buffer_size(None);
    let max = if near { tuning.loopback_mtu_max.min(UDP_PAYLOAD_MAX) } else { GSO_MTU_MAX };
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(max);
    t.initial_mtu(1452.min(max)).mtu_discovery_config(Some(discovery));
    t.enable_segmentation_offload(tuning.gso && max <= GSO_MTU_MAX);
    if tuning.ack_every > 0 {
        let every = if near { tuning.ack_every.min(NEAR_ACK_EVERY_MAX) } else { tuning.ack_every };
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(every));
        acks.max_ack_delay(Some(Duration::from_millis(5)));
        t.ack_frequency_config(Some(acks));
    }
    if near {
        t.initial_rtt(Duration::from_millis(10));
    }
    t.congestion_controller_factory(congestion(tuning.congestion, tuning.initial_window_bytes));
    t
}

fn congestion(kind: Congestion, window: u64) -> Arc<dyn ControllerFactory + Send + Sync> {
    match kind {
        Congestion::Cubic => {
            let mut c = CubicConfig::default();
            c.initial_window(window);
            Arc::new(c)
        }
        Congestion::NewReno => {
            let mut c = NewRenoConfig::default();
            c.initial_window(window);
            Arc::new(c)
        }
        Congestion::Bbr => {
            let mut c = BbrConfig::default();
            c.initial_window(window);
            Arc::new(c)
        }
    }
}

/// Lets a peer that has proven who it is use what a peer may use.
pub(crate) fn admit_peer(cfg: &NetConfig, connection: &quinn::Connection, requests_max: u32) {
    connection.set_max_concurrent_uni_streams(VarInt::from_u32(cfg.streams_max));
    // One more: the control stream.
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(requests_max + 1));
    connection.set_receive_window(VarInt::from_u32(cfg.receive_window_bytes));
}
