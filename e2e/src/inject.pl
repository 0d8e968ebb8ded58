# inject.pl ADDRESS VNI COUNT, on a node: sends broadcast frames to a network of another node, as if they came by its tunnel.
use strict;
my ($address, $vni, $count) = @ARGV;
socket(my $socket, 2, 2, 17) or die "socket: $!";
# RFC 7348, section 5; the frame is of a type for local experiments.
my $packet = pack('C x3 N', 8, $vni << 8) . "\xff" x 6 . "\x02\x00\x00\x00\x00\x09" . "\x88\xb5" . "\x00" x 46;
for my $port (7788, 7789) {
  my $to = pack('S n C4 x8', 2, $port, split(/\./, $address));
  for (1 .. $count) { send($socket, $packet, 0, $to) or die "send: $!" }
}
