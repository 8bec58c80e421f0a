"""The log on disk, and everything beside it that can be made anew from it.

records, segments, log, log_writer                  transitions as bytes; files of frames; group commit, in a thread
segment_scan, segment_reader                        every frame of a file; records by their locations
directory                                           all of it together, as the recorder uses it
index, index_file, run_index, selection             what has ended, by id, outside of memory
snapshots, stored_state, recovery                   live state at a place of the log, so that a restart reads the tail
retention, backup, generation                       what may be deleted; copies; which log this is
offline, verification, columns                      a directory without a buffer
"""
