//! The door for a node process whose replica spans hosts: frames of bytes to and from the other hosts.

use crate::detach::detached;
use crate::error;
use crate::request::parse_address;
use llmscale_engine::{GroupDoor, GroupKeys};
use llmscale_net::{Address, KeyPair, PeerId};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where the hosts of one replica meet. With a key file both sides prove that they hold the fleet's node key; without
/// one the address must be on loopback.
#[pyclass(frozen, name = "GroupDoor", module = "llmscale._core")]
pub(crate) struct PyGroupDoor {
    inner: Mutex<Option<GroupDoor>>,
}

pub(crate) fn load_keys(key_file: Option<&str>) -> PyResult<GroupKeys> {
    let pair = key_file.map(|path| KeyPair::load(Path::new(path))).transpose();
    pair.map(GroupKeys::new).map_err(|error| error::config(error.to_string()))
}

#[pymethods]
impl PyGroupDoor {
    /// Listens as the leader.
    #[staticmethod]
    #[pyo3(signature = (address, key_file = None))]
    fn listen(address: &str, key_file: Option<&str>) -> PyResult<Self> {
        Self::open(GroupDoor::listen, address, key_file)
    }

    /// Connects as a follower, in the background, again and again.
    #[staticmethod]
    #[pyo3(signature = (address, key_file = None))]
    fn connect(address: &str, key_file: Option<&str>) -> PyResult<Self> {
        Self::open(GroupDoor::connect, address, key_file)
    }

    /// Where it listens, or connects to.
    #[getter]
    fn address(&self) -> PyResult<String> {
        self.with(|door| door.address().to_string())
    }

    /// Whether a follower's connection is up.
    #[getter]
    fn connected(&self) -> PyResult<bool> {
        self.with(GroupDoor::is_connected)
    }

    /// Handshakes that failed.
    #[getter]
    fn refusals(&self) -> PyResult<u64> {
        self.with(GroupDoor::refusals)
    }

    /// Readable when `take` has something, or the connection has changed.
    fn fileno(&self) -> PyResult<i32> {
        self.with(|door| door.waker().descriptor())
    }

    /// (peer, frame) of what was heard since the last call; a follower's only peer is 0.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Vec<(u32, Bound<'py, PyBytes>)>> {
        let heard = self.with(GroupDoor::take)?;
        Ok(heard.iter().map(|(peer, frame)| (peer.map_or(0, u32::from), PyBytes::new(py, frame))).collect())
    }

    /// Peers of the leader whose connections have ended, as sending to them has shown since the last call.
    fn take_ended(&self) -> PyResult<Vec<u32>> {
        Ok(self.with(GroupDoor::take_ended)?.into_iter().map(u32::from).collect())
    }

    /// Sends to a peer of the leader, or to the leader with `None`. A frame that cannot pass now is dropped.
    fn send(&self, peer: Option<u32>, frame: Vec<u8>) -> PyResult<bool> {
        self.with(|door| door.send(peer.map(PeerId::from), frame))
    }

    /// Hears no more of a peer whose frames make no sense.
    fn ignore(&self, peer: u32) -> PyResult<bool> {
        self.with(|door| door.ignore(PeerId::from(peer)))
    }

    /// Closes it. Afterwards every other call raises `WorkerError`.
    fn close(&self, py: Python<'_>) {
        let door = self.lock().take();
        detached(py, || drop(door));
    }
}

impl PyGroupDoor {
    fn open<E: std::fmt::Display>(
        how: impl FnOnce(&Address, &GroupKeys) -> Result<GroupDoor, E>,
        address: &str,
        key_file: Option<&str>,
    ) -> PyResult<Self> {
        let keys = load_keys(key_file)?;
        let door = how(&parse_address(address)?, &keys).map_err(|error| error::config(error.to_string()))?;
        Ok(Self { inner: Mutex::new(Some(door)) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<GroupDoor>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, work: impl FnOnce(&GroupDoor) -> T) -> PyResult<T> {
        self.lock().as_ref().map(work).ok_or_else(|| error::worker("the door is closed".to_owned()))
    }
}
