"""The log on disk, and everything beside it that can be made again from it.

records, segments, log, log_writer         transitions as bytes; files of frames; group commit, in a thread
segment_reader                             records, or some of their columns, by their locations
directory                                  all of it together, as the run store uses it
index, index_file, run_index               what has ended, by id, outside of memory
snapshots, stored_state, recovery          live state at a place of the log, so that a restart reads the tail
retention, backup                          what may be deleted; copies
offline, verification                      a directory without a buffer
"""
