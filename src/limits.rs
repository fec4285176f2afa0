//! Every hard maximum of the program, with its unit in the name.
//!
//! A limit is here when exceeding it must be an error rather than a slow surprise: frame sizes,
//! queue lengths, counts that come from untrusted input.

/// Largest message on the HELLO socket, in bytes (both directions).
pub const HELLO_BYTES_MAX: usize = 64 * 1024;

/// Largest descriptor frame on the data socket, in bytes (both directions, without inline payload).
pub const FRAME_BYTES_MAX: usize = 64 * 1024;

/// Largest request or reply line on the control socket, in bytes. A policy of 1,000 sub-policies
/// is about 100 kB.
pub const CONTROL_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Longest path of a Unix socket, in bytes (`sun_path` is 108; libzmq and the kernel want room).
pub const SOCKET_PATH_BYTES_MAX: usize = 80;

/// Most consumers connected at once.
pub const SESSIONS_MAX: usize = 1024;

/// File descriptors of one consumer: HELLO socket, pidfd, slab, window or the pipe of a slab on a
/// GPU, ZeroMQ's connection, and two of another slab whose tensors outlive it.
pub const SESSION_FDS: u64 = 7;

/// File descriptors that are kept for everything else: files, control and TCP connections.
pub const RESERVED_FDS: u64 = 128;

/// Slabs on GPUs that are opened at once.
pub const GPU_OPENINGS_MAX: usize = 16;

/// News from the threads of slabs on GPUs that wait at once.
pub const GPU_NEWS_MAX: usize = 4096;

/// Most slots in one consumer's slab.
pub const SLOTS_MAX: u32 = 256;

/// Fewest slots in one consumer's slab: one that the trainer reads, one that is being filled.
pub const SLOTS_MIN: u32 = 2;

/// Largest slab of one consumer, in bytes.
pub const SLAB_BYTES_MAX: u64 = 16 * 1024 * 1024 * 1024;

/// Most samples in one batch of one rank.
pub const BATCH_SIZE_MAX: u32 = 1 << 20;

/// Most ranks in a group.
pub const WORLD_SIZE_MAX: u32 = 1 << 16;

/// Most samples in a split. Sample indices fit an `i64`, as torch wants them.
pub const SAMPLES_MAX: u64 = 1 << 40;

/// Largest image side, in pixels.
pub const IMAGE_SIDE_MAX: u32 = 16_384;

/// Most pixels of an encoded image, unless the configuration says otherwise: twice the number at
/// which Pillow warns of a decompression bomb.
pub const IMAGE_PIXELS_DEFAULT: u64 = 178_956_970;

/// Largest side of an encoded image that a configuration may allow, in pixels.
pub const ENCODED_SIDE_MAX: u64 = 1 << 20;

/// Most pixels of an encoded image that a configuration may allow.
pub const ENCODED_PIXELS_MAX: u64 = 1 << 30;

/// Most bytes of one encoded image.
pub const ENCODED_BYTES_MAX: u64 = 1 << 30;

/// Most samples that are listed as bad, of one split.
pub const QUARANTINE_LINES_MAX: usize = 1_000_000;

/// Most room for decoded images that streams share, in MiB.
pub const SHARED_MIB_MAX: u64 = 1 << 20;

/// Largest decoded image, in bytes.
pub const IMAGE_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// Most views of a sample.
pub const VIEWS_MAX: u32 = 64;

/// Most classes whose labels are mixed: each sample has a vector of so many f32.
pub const MIX_CLASSES_MAX: u32 = 65_536;

/// Most sub-policies in a policy.
pub const SUB_POLICIES_MAX: usize = 10_000;

/// Most operations in one sub-policy.
pub const SUB_POLICY_OPS_MAX: usize = 16;

/// Most sub-policies drawn and applied per sample.
pub const POLICY_DRAWS_MAX: u32 = 16;

/// Largest policy file, in bytes.
pub const POLICY_FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Largest configuration file, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// Longest name of a dataset, split or group, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Longest fixed-length label vector, in elements.
pub const LABEL_VECTOR_LEN_MAX: u32 = 65_536;

/// Most chunks of samples that wait for worker threads, and most finished batches that wait to be
/// announced.
pub const CHUNK_QUEUE_MAX: usize = 4096;

/// Most events that wait for the stream server's thread.
pub const SERVER_EVENTS_MAX: usize = 4096;

/// Most worker threads.
pub const WORKER_THREADS_MAX: usize = 1024;

/// Largest file of one policy version in the store, in bytes: a policy and its evidence.
pub const POLICY_VERSION_BYTES_MAX: u64 = 12 * 1024 * 1024;

/// Most activations that the policy store remembers per dataset; the oldest are forgotten first.
pub const POLICY_HISTORY_MAX: usize = 1_000;

/// Most connections to the control socket at once.
pub const CONTROL_CONNECTIONS_MAX: usize = 64;

/// Most epochs of a run whose policies are remembered; the oldest are forgotten first.
pub const PINNED_EPOCHS_MAX: usize = 1024;

/// Most runs whose policies are held in memory; files of named runs are not counted.
pub const PINNED_RUNS_MAX: usize = 4096;

/// Most policies that are held ready to be applied.
pub const PREPARED_POLICIES_MAX: usize = 256;

/// Most classes of a split: counts come from files, and tables are made of them.
pub const CLASSES_MAX: u32 = 1 << 20;

/// Largest file of class names, in bytes.
pub const CLASS_NAMES_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Largest footer of a packed file, in bytes (24 per record batch of 32 MiB, and the metadata).
pub const ARROW_FOOTER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Longest part of a wrong value that an error message quotes, in characters.
pub const QUOTE_CHARS_MAX: usize = 80;

/// Most folds of a search: each costs a trained model.
pub const FOLDS_MAX: u32 = 64;

/// Largest line of a search's journal, in bytes. An affinity table or a policy is about 100 kB.
pub const JOURNAL_LINE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Largest journal of a search, in bytes; a round writes about 1 MB.
pub const JOURNAL_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// Most dimensions of a search space; the paper's has 30.
pub const SEARCH_DIMENSIONS_MAX: usize = 1024;

/// Largest line of the search worker's output, in bytes: an event.
pub const SEARCH_EVENT_BYTES_MAX: usize = 64 * 1024;

/// Most lines of a search worker's output that are no events; with more it is stopped and started
/// anew.
pub const SEARCH_BAD_LINES_MAX: u64 = 1_000;

/// Most GPUs of a host that are looked at.
pub const GPUS_MAX: u32 = 64;

/// Most notes, and most outcomes of rounds, of the search that the daemon keeps for its status.
pub const SEARCH_STATUS_ITEMS_MAX: usize = 100;

/// Longest text of such a note or outcome, in characters; what is longer is cut.
pub const SEARCH_TEXT_CHARS_MAX: usize = 4_000;

/// Most runs whose reported metrics are remembered; the oldest are forgotten first.
pub const METRIC_RUNS_MAX: usize = 1024;

/// Most reported values of a run that are remembered; the oldest are forgotten first.
pub const METRIC_VALUES_MAX: usize = 64;

/// Longest reference of a policy in a report, in bytes: a path, at the longest.
pub const POLICY_REFERENCE_BYTES_MAX: usize = 4096;
