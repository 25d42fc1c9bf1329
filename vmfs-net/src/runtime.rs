//! What quinn runs on: tokio, with a socket that is quiet and tasks that can be run on the spot.
//!
//! quinn's own binding waits for a socket to become readable and writable at once, so the kernel wakes the
//! sender each time that a receiver has taken a datagram, for nothing. This one asks for writability only
//! after a send was refused, and takes a receive that came back short for the last one: a call less per packet.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncTimer, AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::spot;

/// See the module.
#[derive(Debug)]
pub(crate) struct Runtime;

impl quinn::Runtime for Runtime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(tokio::time::sleep_until(at.into()))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        spot::spawn(&tokio::runtime::Handle::current(), future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        socket.set_nonblocking(true)?;
        let state = UdpSocketState::new((&socket).into())?;
        let io = register(socket, Interest::READABLE)?;
        Ok(Arc::new(Socket { io, state, refused: AtomicBool::new(false) }))
    }

    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
}

fn register<T: Into<OwnedFd> + AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: what can be turned into an owned descriptor owns one, always the same, until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(owner, interest) }?)
}

struct Socket {
    io: AsyncFd<std::net::UdpSocket>,
    state: UdpSocketState,
    /// A send found the buffer full, and nobody has seen it writable since.
    refused: AtomicBool,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(self.io.get_ref()).finish()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(self.io.get_ref().into(), transmit);
        if matches!(&sent, Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
            self.refused.store(true, Ordering::Release);
        }
        sent
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            match self.state.recv(self.io.get_ref().into(), bufs, meta) {
                Ok(count) => {
                    // Fewer than asked for: there were no more. What has come since makes it ready anew.
                    if count < bufs.len().min(BATCH_SIZE) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                // Out of memory, say. quinn takes an error for the end of the endpoint, with all its
                // connections; its own binding never returns one.
                Err(e) => {
                    tracing::debug!("receiving: {e}");
                    return Poll::Ready(Ok(0));
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }
}

/// Waits for a socket that has refused a send.
#[derive(Debug)]
struct Writable {
    socket: Arc<Socket>,
    /// A second descriptor of the socket, registered for this alone.
    waiting: Option<AsyncFd<OwnedFd>>,
}

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.socket.refused.load(Ordering::Acquire) {
            this.waiting = None;
            return Poll::Ready(Ok(()));
        }
        let waiting = match &mut this.waiting {
            Some(waiting) => waiting,
            none => {
                let fd = this.socket.io.get_ref().as_fd().try_clone_to_owned()?;
                none.insert(register(fd, Interest::WRITABLE)?)
            }
        };
        let _ready = ready!(waiting.poll_write_ready(cx))?;
        this.socket.refused.store(false, Ordering::Release);
        this.waiting = None;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use quinn::Runtime as _;
    use rustix::net::sockopt::set_socket_send_buffer_size;

    use super::*;

    async fn receive(socket: &Arc<dyn AsyncUdpSocket>) -> usize {
        let mut space = vec![0; 4 * 2048];
        let mut bufs: Vec<_> = space.chunks_mut(2048).map(IoSliceMut::new).collect();
        let mut meta = [RecvMeta::default(); 4];
        std::future::poll_fn(|cx| socket.poll_recv(cx, &mut bufs, &mut meta)).await.unwrap()
    }

    /// Each datagram wakes the receiver, also after receives that came back short, and one that came in full.
    #[tokio::test]
    async fn every_datagram_is_received() {
        let bind = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (plain, socket) = (bind(), Runtime.wrap_udp_socket(bind()).unwrap());
        let to = socket.local_addr().unwrap();
        for count in [1, 4, 3, 4, 4, 1] {
            for _ in 0..count {
                plain.send_to(b"datagram", to).unwrap();
            }
            let mut got = 0;
            while got < count {
                got += tokio::time::timeout(Duration::from_secs(5), receive(&socket)).await.unwrap();
            }
            assert_eq!(got, count);
        }
    }

    /// A full send buffer makes the sender wait, and emptying it wakes it.
    #[tokio::test]
    async fn a_full_buffer_is_waited_for() {
        let (to, from) = std::os::unix::net::UnixDatagram::pair().unwrap();
        set_socket_send_buffer_size(&from, 4096).unwrap();
        from.set_nonblocking(true).unwrap();
        // The waiting does not depend on the kind of socket; a UDP one on loopback is never full.
        let socket = std::net::UdpSocket::from(OwnedFd::from(from));
        let state = UdpSocketState::new((&std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).into()).unwrap();
        let io = register(socket, Interest::READABLE).unwrap();
        let socket = Arc::new(Socket { io, state, refused: AtomicBool::new(false) });
        let mut poller = Arc::clone(&socket).create_io_poller();
        let mut writable = async || std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx)).await;
        writable().await.unwrap();
        let full = || rustix::io::write(socket.io.get_ref(), &[0; 1024]).is_err();
        while !full() {}
        socket.refused.store(true, Ordering::Release);
        let waited = tokio::time::timeout(Duration::from_millis(50), writable()).await;
        assert!(waited.is_err(), "there is no room");
        while to.set_nonblocking(true).is_ok() && to.recv(&mut [0; 1024]).is_ok() {}
        tokio::time::timeout(Duration::from_secs(5), writable()).await.unwrap().unwrap();
        assert!(!full());
    }
}
