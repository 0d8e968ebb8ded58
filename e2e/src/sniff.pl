# sniff.pl ADDRESS MARKER VNI, on a node: looks at what the interface with that address sends and gets until standard input ends, and prints how
# many frames have the marker in them, how many are VXLAN's with that VNI, and how many WireGuard's.
use strict;
my ($address, $marker, $vni) = @ARGV;
my ($interface) = map { (split)[1] } grep { (split)[3] =~ m{^\Q$address\E/} } `ip -o -4 address show`;
my $index = do { local @ARGV = "/sys/class/net/$interface/ifindex"; <> };
# packet(7): AF_PACKET, SOCK_RAW, ETH_P_ALL.
socket(my $socket, 17, 3, 0x300) or die "socket: $!";
bind($socket, pack('S n i S C C a8', 17, 3, $index, 0, 0, 0, '')) or die "bind: $!";
my ($marked, $vxlan, $wireguard) = (0, 0, 0);
syswrite(STDOUT, "looking at $interface\n");
while (1) {
  my $ready = '';
  vec($ready, $_, 1) = 1 for fileno(STDIN), fileno($socket);
  select($ready, undef, undef, undef);
  if (vec($ready, fileno($socket), 1)) {
    recv($socket, my $frame, 65535, 0x40);
    $marked++ if index($frame, $marker) >= 0;
    next unless substr($frame, 12, 2) eq "\x08\x00" && substr($frame, 23, 1) eq "\x11";
    my $port = unpack('n', substr($frame, 36, 2));
    # RFC 7348, section 5: the VNI is in bytes 4 to 6 of the header, which follows UDP's.
    $vxlan++ if ($port == 7788 || $port == 7789) && unpack('N', "\0" . substr($frame, 46, 3)) == $vni;
    $wireguard++ if $port == 7795 || $port == 7796;
  } else {
    last unless sysread(STDIN, my $byte, 1);
  }
}
print "$marked $vxlan $wireguard\n";
