/* A guest that idles: a periodic synthetic timer of 250 Hz, HLT in between. A Multiboot kernel.
 *
 * It writes "idle" to COM1, takes TICKS ticks, and writes "done" with the reference time that they took, in hexadecimal
 * units of 100 ns; then it ends by isa-debug-exit if there is one. With MESSAGES defined the ticks come as SynIC messages, else as direct interrupts.
 * TLFS v6.0b, chapters 11 and 12; Intel SDM volume 3, chapters 6 and 11; Multiboot specification 0.6.96.
 */
#define PERIOD 40000
#define VECTOR 0x50
#define SPURIOUS 0xff
#define SINT 3
#define SLOT (message_page + 256 * SINT)
#define COM1 0x3f8
#define APIC_EOI 0xfee000b0
#define APIC_SPURIOUS 0xfee000f0

.macro write_msr number, low
    movl $\number, %ecx
    movl $\low, %eax
    xorl %edx, %edx
    wrmsr
.endm

.macro gate vector, handler
    movl $\handler, %eax
    movw %ax, idt + 8 * \vector
    movw $8, idt + 8 * \vector + 2
    movw $0x8e00, idt + 8 * \vector + 4
    shrl $16, %eax
    movw %ax, idt + 8 * \vector + 6
.endm

    .text
    .balign 4
    .long 0x1badb002, 0, -0x1badb002
    .globl _start
_start:
    cli
    lgdt gdt_pointer
    ljmp $8, $1f
1:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $stack_top, %esp
    movb $0xff, %al /* no interrupts from the PICs */
    outb %al, $0x21
    outb %al, $0xa1
    gate VECTOR, tick
    gate SPURIOUS, spurious
    lidt idt_pointer
    movl $(0x100 | SPURIOUS), APIC_SPURIOUS

    write_msr 0x40000000, 1                  /* GUEST_OS_ID */
#ifdef MESSAGES
    write_msr 0x40000080, 1                  /* SCONTROL */
    write_msr 0x40000083, message_page + 1   /* SIMP */
    write_msr 0x40000093, VECTOR             /* SINT3 */
#endif
    movl $idle_text, %esi
    call print
    movl $0x40000020, %ecx                   /* TIME_REF_COUNT */
    rdmsr
    movl %eax, %edi
    write_msr 0x400000b1, PERIOD             /* STIMER0_COUNT, then STIMER0_CONFIG: enabled, periodic */
#ifdef MESSAGES
    write_msr 0x400000b0, (SINT << 16 | 3)
#else
    write_msr 0x400000b0, (1 << 12 | VECTOR << 4 | 3)
#endif
2:  sti
    hlt
    cli
    cmpl $TICKS, ticks
    jb 2b
    movl $0x40000020, %ecx
    rdmsr
    subl %edi, %eax
    movl %eax, %edi
    write_msr 0x400000b0, 0
    movl $done_text, %esi
    call print
    movl $8, %ebp
3:  roll $4, %edi
    movl %edi, %ebx
    andl $15, %ebx
    movb digits(%ebx), %bl
    call put
    decl %ebp
    jnz 3b
    movb $'\n', %bl
    call put
    xorl %eax, %eax
    outb %al, $0xf4                          /* isa-debug-exit, where it is */
4:  hlt
    jmp 4b

print: /* ESI: text */
    movb (%esi), %bl
    testb %bl, %bl
    jz 5f
    call put
    incl %esi
    jmp print
5:  ret

put: /* BL: byte */
    movw $(COM1 + 5), %dx
6:  inb %dx, %al
    testb $0x20, %al
    jz 6b
    movw $COM1, %dx
    movb %bl, %al
    outb %al, %dx
    ret

tick:
    pusha
    incl ticks
#ifdef MESSAGES
    movl $0, SLOT
    lock orl $0, (%esp)
    testb $1, SLOT + 5
    jz 7f
    write_msr 0x40000084, 0                  /* EOM */
7:
#endif
    movl $0, APIC_EOI
    popa
spurious:
    /* The same as iret, to the same privilege level; KVM's emulator has no iret in protected mode. */
    pushl 8(%esp)
    popf
    lret $4

    .data
    .balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt
idt_pointer:
    .word 2047
    .long idt
ticks:
    .long 0
digits:
    .ascii "0123456789abcdef"
idle_text:
    .asciz "idle\n"
done_text:
    .asciz "done "

    .bss
    .balign 4096
message_page:
    .skip 4096
idt:
    .skip 2048
    .skip 4096
stack_top:
    .section .note.GNU-stack, "", @progbits
