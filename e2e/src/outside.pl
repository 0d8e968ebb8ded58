# outside.pl PORT, where the nodes' network is: tells whoever connects by which address it is seen, until standard input ends.
use strict;
use IO::Socket::INET;
my $listener = IO::Socket::INET->new(LocalPort => $ARGV[0], Listen => 10, ReuseAddr => 1) or die "listen: $!";
syswrite(STDOUT, "listening\n");
while (1) {
  my $ready = '';
  vec($ready, $_, 1) = 1 for fileno(STDIN), fileno($listener);
  select($ready, undef, undef, undef);
  if (vec($ready, fileno($listener), 1)) {
    my $client = $listener->accept or next;
    print $client $client->peerhost, "\n";
    close($client);
  } else {
    last unless sysread(STDIN, my $byte, 1);
  }
}
